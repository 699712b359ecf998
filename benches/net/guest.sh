# The guest half of `cargo xtask bench net`: sh guest.sh ADDRESS/ROUTER/SERVER/MTU SECONDS. Prints a "begin", an "end" and
# "figure NAME<tab>VALUE<tab>UNIT" for each measurement, or "bad" and why; more is better.
seconds=$2
IFS=/ read -r address router server mtu << WORDS
$1
WORDS
mount -t tmpfs tmp /tmp
ip link set lo up
ip link set eth0 mtu "$mtu" up
ip addr add "$address/24" dev eth0
ip route add default via "$router" dev eth0
tab=$(printf '\t')

# stream NAME OPTION...: what the receiver got in all
stream() {
    name=$1
    shift
    echo "begin"
    timeout $((seconds + 40)) iperf3 -c "$server" -f k -i 0 -t "$seconds" "$@" > /tmp/out 2>&1
    echo "end"
    # The last such line is the sum of all streams.
    rate=$(awk '/receiver$/ { for (i = 2; i <= NF; i++) if ($i == "Kbits/sec") rate = $(i - 1) } END { print rate }' /tmp/out)
    if [ "$rate" ]; then
        echo "figure $name$tab$(awk "BEGIN { print $rate / 1000 }")${tab}Mbit/s"
    else
        echo "bad $name: $(tail -n 3 /tmp/out | tr '\n' ' ')"
    fi
}
# program NAME MODE...: a figure that the traffic program prints
program() {
    name=$1
    shift
    echo "begin"
    rate=$(traffic "$@" 2> /tmp/out)
    echo "end"
    if [ "$rate" ]; then
        echo "figure $name$tab$rate${tab}1/s"
    else
        echo "bad $name: $(tail -n 3 /tmp/out | tr '\n' ' ')"
    fi
}

# The first connection finds addresses out.
traffic answers "$server" 5300 1 > /dev/null
stream "TCP out, 1 stream"
stream "TCP in, 1 stream" -R
stream "TCP out, 8 streams" -P 8
stream "TCP in, 8 streams" -P 8 -R
stream "UDP out, 1 stream" -u -b 0 -l 1400
stream "UDP in, 1 stream" -u -b 0 -l 1400 -R
stream "UDP out, 8 streams" -u -b 0 -l 1400 -P 8
stream "UDP in, 8 streams" -u -b 0 -l 1400 -P 8 -R
program "there and back, 1 byte by TCP" answers "$server" 5300 "$seconds"
program "short connections, 4 at once" connections "$server" 5300 "$seconds" 4
# The host still has to look at this machine's last exits.
sleep 2
