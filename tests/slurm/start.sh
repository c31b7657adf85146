#!/usr/bin/env bash
# A SLURM of one node on this machine, in a folder of its own, for tests: munged, slurmctld and slurmd, no accounting.
# usage: start.sh FOLDER [CPUS]     then: export SLURM_CONF=FOLDER/slurm.conf
#        start.sh --stop FOLDER
# Needs Debian's slurm-wlm and munge, and root. Nothing outside FOLDER is written, and nothing else is reachable: all
# three listen on this machine's loopback address or on sockets in FOLDER.
set -euo pipefail

if [ "${1:-}" = --stop ]; then
  folder=$2
  for name in slurmd slurmctld munged; do
    [ -s "$folder/$name.pid" ] && kill "$(cat "$folder/$name.pid")" 2>/dev/null || true
  done
  exit 0
fi

folder=$(mkdir -p "$1" && cd "$1" && pwd)
cpus=${2:-2}
mkdir -p "$folder"/{state,spool,log,munge}
chmod 755 "$folder" "$folder"/{state,spool,log,munge}
port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

head -c 1024 /dev/urandom >"$folder/munge.key"
chmod 400 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/log/munged" --seed-file="$folder/munge/seed"

cat >"$folder/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CryptoType=crypto/munge
CredType=cred/munge
SlurmctldPort=$(port)
SlurmdPort=$(port)
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,requeue_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
ReturnToService=2
KillWait=15
MinJobAge=60
InactiveLimit=0
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$cpus State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
EOF
export SLURM_CONF=$folder/slurm.conf
slurmctld
slurmd
for _ in $(seq 100); do
  [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ] && exit 0
  sleep 0.2
done
echo "SLURM did not come up; logs in $folder/log" >&2
tail -n 5 "$folder"/log/* >&2
exit 1
