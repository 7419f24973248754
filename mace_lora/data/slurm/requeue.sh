# To be sourced by a batch script: run_or_requeue COMMAND ARGUMENT ...
#
# Runs the command. When SLURM announces the time limit (SIGUSR1 to the batch script, asked for with
# --signal=B:USR1@120) or the job is preempted (SIGTERM), the signal goes on to the command, which
# writes a checkpoint and leaves with code 75: the job is put in the queue again and, started anew,
# goes on from there. Other codes end the job.
#
# STOP_SIGNAL: what the command is sent (USR1). MAX_REQUEUES: after so many it is an error (50), so
# that a job whose time limit is too short for any progress does not go round for ever.
REQUEUE=75

run_or_requeue() {
    local status=0
    echo "Start $((${SLURM_RESTART_COUNT:-0} + 1)) of job ${SLURM_JOB_ID:-none} on $(hostname): $*"
    run_passing_signals "$@" || status=$?
    trap '' USR1 TERM
    if [ "$status" -eq "$REQUEUE" ] || { [ -n "$signalled" ] && [ "$status" -ne 0 ]; }; then
        requeue
    fi
    return "$status"
}

# Runs a command, which gets STOP_SIGNAL when this shell gets SIGUSR1 or SIGTERM; `signalled` says so.
run_passing_signals() {
    local child status=0
    signalled=""
    "$@" &
    child=$!
    # shellcheck disable=SC2064
    trap "signalled=1; kill -${STOP_SIGNAL:-USR1} $child 2>/dev/null || true" USR1 TERM
    while kill -0 "$child" 2>/dev/null; do
        wait "$child" || true # a signal ends the waiting, not the command
    done
    wait "$child" || status=$?
    return "$status"
}

requeue() {
    # Of an array, this task: one task has the number of the whole array for its job number
    local job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
    job="${job:-$SLURM_JOB_ID}"
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_REQUEUES:-50}" ]; then
        echo "error: started ${SLURM_RESTART_COUNT} times again and still not done;" \
            "give a longer --time, or a larger MAX_REQUEUES" >&2
        exit 1
    fi
    echo "Stopped with a checkpoint; job $job goes to the queue again"
    scontrol requeue "$job"
    sleep 60 # until SLURM ends this script: its own exit would count as the end of the job
}
