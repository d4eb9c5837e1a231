#!/usr/bin/env bash
# Tokenize on a Slurm cluster: 64 ranks with one GPU each, then merge.
#
#   IN=items.json OUT=s3://bucket/items CONFIG=yamls/tokenize/chameleon.yaml bash examples/slurm-tokenize.sh \
#       tokenizer=PATH vision.weights=PATH
#
# OUT, IN and the images must be on shared storage, or be URLs. The merge runs even if some ranks failed, and names the
# missing chunks. The same command continues from there, with any number of ranks.
set -euo pipefail

SPLITS=${SPLITS:-64}
: "${IN:?}" "${OUT:?}" "${CONFIG:=yamls/tokenize/chameleon.yaml}"
export IN OUT CONFIG SPLITS

workers=$(sbatch --parsable --job-name tokenize --array "0-$((SPLITS - 1))" --gres gpu:1 --cpus-per-task 8 --time 24:00:00 \
    --requeue --output "tokenize-%A-%a.log" --export ALL --wrap "
    .venv/bin/python -m unitoken.tokenize run --config \"\$CONFIG\" --in_filename \"\$IN\" --out_dir \"\$OUT\" \
        --rank \$SLURM_ARRAY_TASK_ID --splits \$SPLITS ${*@Q}")

sbatch --job-name tokenize-merge --dependency "afterany:${workers%%;*}" --cpus-per-task 4 --time 01:00:00 \
    --output "tokenize-merge-%j.log" --export ALL --wrap ".venv/bin/python -m unitoken.tokenize merge --out_dir \"\$OUT\""
