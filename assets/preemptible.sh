# Train, and go on from the last checkpoint after a preemption: bash assets/preemptible.sh DIR FLAGS_OF_TRAIN
# From the project's folder: bash assets/preemptible.sh runs/refcoco --dataset refcoco --checkpoint-every 500
# It uses 4 GPUs; with 2: GPUS=2 bash assets/preemptible.sh ..
# It ends with 0 when all is done, with 75 after SIGTERM (then start it again), with 1 at an error.
# Once DIR has a checkpoint, the flags are those that the run was started with.

out=$1; shift; mkdir -p "$(dirname "$out")"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300  # else, and with older torch, torchrun kills 30 s after SIGTERM
trap 'kill $child; wait $child; exit 75' TERM INT  # hand it on, and wait for the checkpoint
while true; do
    [ -e "$out/last.pt" ] && set -- --resume
    touch "$out.started"
    torchrun --nproc_per_node=${GPUS:-4} train.py "$@" --out "$out" & child=$!
    wait $child && exit 0
    [ "$out/last.pt" -nt "$out.started" ] || exit 1  # no new checkpoint: read the error
done
