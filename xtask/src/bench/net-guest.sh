# In the guest: iperf3 with the host, each line of its own after the name of what is measured. $1: seconds for each.
mount -t tmpfs tmp /tmp
measure() {
    echo "-- $1"
    shift
    timeout $((seconds + 30)) iperf3 -c 192.168.77.1 -f k -i 0 -t "$seconds" "$@" 2>&1
}
seconds=$1
measure "TCP out, 1 stream"
measure "TCP in, 1 stream" -R
measure "TCP out, 8 streams" -P 8
measure "TCP in, 8 streams" -P 8 -R
measure "UDP out, 1 stream" -u -b 0 -l 1400
measure "UDP in, 1 stream" -u -b 0 -l 1400 -R
measure "UDP out, 8 streams" -u -b 0 -l 1400 -P 8
measure "UDP in, 8 streams" -u -b 0 -l 1400 -P 8 -R
