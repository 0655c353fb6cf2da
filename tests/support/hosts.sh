#!/bin/bash
# Two hosts on one machine, fastft1 (10.66.0.1) and fastft2 (10.66.0.2), to launch on two hosts without having two:
#     hosts.sh up               the hosts, each with an sshd that knows the other's key
#     hosts.sh slurm            on top, a SLURM cluster of them, a node each, its controller on the first
#     hosts.sh on HOST COMMAND...
#     hosts.sh down             with all that still runs on them
# A host is a network namespace: its own interface, loopback, ports, /etc/hosts, /etc/ssh and host name. Files are this
# machine's, and so are processes, but what comes in by ssh sees only its like on its host. The cable joins the two and
# nothing else: no route leads out of them.
# Wants root, and of Debian 12: iproute2 openssh-server pdsh, and for SLURM slurmctld slurmd slurm-client.
set -euo pipefail

hosts="fastft1 fastft2"
slurm=/run/fastft-slurm
sshd=$(command -v sshd || echo /usr/sbin/sshd)

# `ip netns exec` lays /etc/netns/HOST/* over /etc/*. The host name is for Gloo and torchrun, which look their own
# address up by it, and for slurmd. All of it is exec, so that the process is COMMAND itself and signals reach it.
on() {
    host=$1
    shift
    [ ! -e $slurm ] || export SLURM_CONF=$slurm/slurm.conf
    exec ip netns exec "$host" unshare --uts sh -c 'hostname "$0" && exec "$@"' "$host" "$@"
}

down() {
    for host in $hosts; do
        if [ -e "/run/netns/$host" ]; then
            for signal in TERM KILL; do
                ip netns pids "$host" | xargs --no-run-if-empty kill -$signal 2> /dev/null || true
                for _ in $(seq 20); do
                    [ -n "$(ip netns pids "$host")" ] || break
                    sleep 0.1
                done
            done
            ip netns delete "$host" # and with it its end of the cable, and so the other end
        fi
        rm -rf "/etc/netns/$host"
    done
    rm -rf $slurm
    [ ! -d /etc/netns ] || rmdir --ignore-fail-on-non-empty /etc/netns
}

up() {
    down
    mkdir -p /run/sshd # for sshd's separation of privileges: with no init system nobody else makes it
    for host in $hosts; do
        etc=/etc/netns/$host
        mkdir -p "$etc/ssh"
        printf '127.0.0.1 localhost\n10.66.0.1 fastft1\n10.66.0.2 fastft2\n' > "$etc/hosts"
        # `deepspeed` runs a plain `ssh HOST`, and ssh takes ~ from /etc/passwd, not from HOME: the settings have to be in
        # /etc/ssh. One key for everything: the hosts' own and the user's.
        if [ "$host" = fastft1 ]; then
            ssh-keygen -q -t ed25519 -N '' -C fastft-hosts -f "$etc/ssh/key"
        else
            cp -p /etc/netns/fastft1/ssh/key* "$etc/ssh/"
        fi
        cat > "$etc/ssh/ssh_config" << 'EOF'
IdentityFile /etc/ssh/key
IdentitiesOnly yes
BatchMode yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
EOF
        cat > "$etc/ssh/sshd_config" << 'EOF'
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
AuthenticationMethods publickey
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
EOF
        ip netns add "$host"
        ip -n "$host" link set lo up # a host talks to itself too: `deepspeed` on the first one runs `ssh` to it
    done
    ip link add net0 netns fastft1 type veth peer name net0 netns fastft2
    for host in $hosts; do
        ip -n "$host" address add "10.66.0.${host#fastft}/24" dev net0
        ip -n "$host" link set net0 up
        # Processes of its own: a stopped `deepspeed` has every host `pkill -f` all launchers that it sees. sshd wants
        # its full path.
        (on "$host" unshare --pid --fork --mount-proc "$sshd" -D -E /etc/ssh/sshd.log) < /dev/null > /dev/null 2>&1 &
    done
    for host in $hosts; do
        for _ in $(seq 100); do
            ! (on fastft1 ssh "$host" true) 2> /dev/null || continue 2
            sleep 0.1
        done
        tail -n 20 /etc/netns/*/ssh/sshd.log >&2
        exit 1
    done
}

slurm() {
    rm -rf $slurm
    mkdir -p $slurm/{state,slurmd.fastft1,slurmd.fastft2}
    # `ip netns exec` mounts a /sys without cgroups: slurmd still wants a plugin for them by name, but then uses none.
    echo CgroupPlugin=cgroup/v1 > $slurm/cgroup.conf
    cat > $slurm/slurm.conf << EOF
ClusterName=fastft
SlurmctldHost=fastft1
SlurmUser=root
# nobody to tell apart here: no munge
AuthType=auth/none
CredType=cred/none
# so long a requeued job waits; 120 seconds by default
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
# between SIGTERM and SIGKILL; 30 seconds by default
KillWait=10
MinJobAge=3600
StateSaveLocation=$slurm/state
SlurmctldPidFile=$slurm/slurmctld.pid
SlurmctldLogFile=$slurm/slurmctld.log
SlurmdPidFile=$slurm/slurmd.%n.pid
SlurmdLogFile=$slurm/slurmd.%n.log
SlurmdSpoolDir=$slurm/slurmd.%n
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=fastft[1-2] CPUs=$(nproc)
PartitionName=low Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=10
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=2
EOF
    (on fastft1 slurmctld)
    for host in $hosts; do (on "$host" slurmd); done
    for _ in $(seq 100); do
        [ "$(on fastft1 sinfo -h -p low -t idle -o %D 2> /dev/null)" != 2 ] || return 0
        sleep 0.1
    done
    tail -n 20 $slurm/*.log >&2
    exit 1
}

case "${1-}" in
    up | slurm | down) "$1" ;;
    on) shift && on "$@" ;;
    *) echo "usage: $0 up | slurm | down | on HOST COMMAND..." >&2 && exit 2 ;;
esac
