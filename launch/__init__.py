"""Starts runs on engines that exist: this machine, SLURM, TPU VMs, GKE; and sweeps of runs."""
