# The study: every variant and three ratios with seeds 0 to 2, five variants also with seeds 3 and 4.
# As many runs go side by side as there are cores. Stopped and started again, it goes on where it was.
# From the project's folder: bash assets/study/run.sh

export OMP_NUM_THREADS=1
mkdir -p runs/study
rows=$(python -c "from selection import *; print(*(f'variant={v}' for v in VARIANTS), 'ratio=0.1 ratio=0.5 ratio=0.8')")
five=$(printf "variant=%s " vega linguistic enhanced-linguistic local-only global-only)
{
    for seed in 0 1 2; do printf "%s $seed\n" $rows; done
    for seed in 3 4; do printf "%s $seed\n" $five; done
} | xargs -P "$(nproc)" -L 1 bash -c '
    out=runs/study/${0#variant=}-$1
    flags="--set $0 --seed $1"
    [ -e $out/last.pt ] && flags=--resume
    [ -e $out/metrics.json ] || python train.py $flags --out $out >> $out.log 2>&1
    echo' | python -m tqdm --total 70 --unit run > /dev/null
STUDY=runs/study pytest -m benchmark -k the_study -s
