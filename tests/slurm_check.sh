#!/usr/bin/env bash
# SLURM on this machine alone while this script runs: are the templates of training/ accepted, and do they run?
# Needs root and Debian's slurm-wlm and munge (apt-get install slurm-wlm munge), and python with open_lm_linear on PATH.
#     bash tests/slurm_check.sh            # sbatch --test-only on every template
#     bash tests/slurm_check.sh --run      # and small CPU runs on pretended nodes: two nodes, seeds, stop and requeue
# Sixteen pretended nodes of 128 cores and 8 GPUs answer from here. All files lie in one folder under /tmp.
set -euo pipefail
cd "$(dirname "$0")/.."

repo=$PWD
work=$(mktemp -d /tmp/slurm_check.XXXXXX)
chmod 755 "$work"
mkdir "$work/state" "$work/spool" "$work/venv" "$work/venv/bin"
touch "$work/venv/bin/activate"
export SLURM_CONF=$work/slurm.conf

end() {
    local code=$? file
    for file in "$work"/slurmd-*.pid "$work/ctld.pid" "$work/munge.pid"; do
        [[ ! -e $file ]] || kill "$(cat "$file")" || true
    done
    sleep 2 # the daemons write as they end
    if [[ $code == 0 ]]; then rm -rf "$work"; else echo "failed ($code); logs are in $work" >&2; fi
}
trap end EXIT

host=$(hostname -s)
cat > "$work/slurm.conf" <<CONF
ClusterName=check
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$work/munge.socket,cred_expire=5
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool/%n
SlurmctldPidFile=$work/ctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
SlurmctldLogFile=$work/ctld.log
SlurmdLogFile=$work/slurmd-%n.log
SlurmctldPort=16817
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=5
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-16] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17016] CPUs=128 RealMemory=1000 Gres=gpu:8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
CONF
echo 'Name=gpu File=/dev/tty[0-7]' > "$work/gres.conf"
(umask 077 && head -c 1024 /dev/urandom > "$work/munge.key")
munged --force --key-file="$work/munge.key" --socket="$work/munge.socket" --pid-file="$work/munge.pid" \
    --log-file="$work/munge.log" --seed-file="$work/munge.seed"
slurmctld -c
for i in $(seq 16); do slurmd -N "n$i" 2>> "$work/start.log"; done
for _ in $(seq 30); do
    [[ $(sinfo -h -t idle -o %D) == 16 ]] && break
    sleep 1
done

echo "== Are the templates accepted?"
for template in training/*.sbatch; do sbatch --test-only "$template"; done
sbatch --test-only --nodes=16 training/multi_node.sbatch
sbatch --test-only --nodes=2 training/requeue.sbatch
[[ ${1-} == --run ]] || exit 0

echo "== A small model and its text"
cat > "$work/make.py" <<'MAKE'
import json, pathlib, sys
import numpy as np
from open_lm_linear.data.manifest import Shard, write_manifest
from open_lm_linear.data.shards import write_shard

work = pathlib.Path(sys.argv[1])
for part in ("train", "val"):
    folder = work / "data" / part
    folder.mkdir(parents=True)
    rows = (np.random.default_rng(0).integers(0, 64, (64, 1)) + 3 * np.arange(17)) % 64
    write_shard(folder / "shard-00000.tar", rows)
    card = {"vocab_size": 64, "seq_len": 16, "tokenizer": "none"}
    write_manifest(folder / "manifest.jsonl", [Shard(str(folder / "shard-00000.tar"), 64)], card)
sizes = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "seq_len": 16, "intermediate_dim_ffn": 48}
(work / "model.json").write_text(json.dumps(sizes))
flags = {"model": str(work / "model.json"), "attn_name": "linear", "logs": str(work / "logs")}
flags |= {"device": "cpu", "workers": 0, "multiple_data_passes": True}
flags |= {"train_num_samples": 8 * 16 * 25, "epochs": 2, "global_batch_size": 8, "warmup": 5, "log_every_n_steps": 10}
(work / "tiny.yaml").write_text(json.dumps(flags))
MAKE
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
export VENV=$work/venv DATA=$work/data RECIPE=$work/tiny.yaml GPUS=1
python "$work/make.py" "$work"

submit() { # name of the run, sbatch's words before --, the training's after; waits for the job's end
    local name=$1 before=()
    shift
    while [[ $1 != -- ]]; do before+=("$1"); shift; done
    shift
    sbatch --parsable --ntasks-per-node=1 --output="$work/$name.out" "${before[@]}" "$@"
}

ended() { # job: waits for it, requeued or not; prints its state and exit code
    local state=
    for _ in $(seq 240); do
        state=$(scontrol show job "$1" | grep -o 'JobState=[A-Z]*\|ExitCode=[0-9:]*' | tr '\n' ' ')
        case $state in *PENDING* | *RUNNING* | *COMPLETING* | *REQUEUED*) sleep 1 ;; *) break ;; esac
    done
    echo "$state"
    [[ $state == *COMPLETED* ]]
}

echo "== One run on two nodes, one torchrun agent each"
job=$(HEAD=127.0.0.1 submit two-nodes --nodes=2 -- training/multi_node.sbatch --name two-nodes)
ended "$job" || { cat "$work/two-nodes.out"; exit 1; }
tail -n 2 "$work/two-nodes.out"

echo "== Two seeds"
job=$(submit seeds --array=0-1 -- training/seeds.sbatch)
for seed in 0 1; do ended "${job}_$seed" || { cat "$work/seeds.out"; exit 1; }; done
ls "$work/logs"

echo "== A run on two nodes that is told to stop, then preempted: it saves, is queued again and ends"
job=$(MASTER_ADDR=127.0.0.1 submit stopped --nodes=2 -- training/requeue.sbatch --name stopped --epochs 20 \
    --save-frequency 1000 --val-frequency 1000)
reached() { # step
    for _ in $(seq 240); do
        grep -q "\"step\": $1," "$work/logs/stopped/metrics.jsonl" 2> /dev/null && break
        sleep 0.5
    done
}
reached 20
scancel --signal=USR1 "$job"
reached 100
sbatch --partition=urgent --nodes=16 --exclusive --output=/dev/null --wrap='sleep 1' # SIGTERM, GraceTime, requeue
ended "$job" || { cat "$work/stopped.out"; exit 1; }
grep -E '^(stopped|saved;|resumed|done)' "$work/stopped.out"
[[ $(grep -c '^stopped.*saved' "$work/stopped.out") == 2 ]]
[[ $(grep -c '^resumed' "$work/stopped.out") == 2 ]]
[[ $(wc -l < "$work/logs/stopped/metrics.jsonl") == 50 ]] # every tenth of 500 steps, each once
