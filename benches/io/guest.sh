# The guest half of `cargo xtask bench io`: sh guest.sh PART FOLDER. FOLDER is a share of the host.
# Prints "figure NAME<tab>VALUE<tab>UNIT"; more is better in all of them.
set -eu
part=$1 dir=$2

figure() { printf 'figure %s\t%s\t%s\n' "$1" "$2" "$3"; }
now() { date +%s%N; }
# figure_since NAME START AMOUNT UNIT: AMOUNT by the seconds that have passed
figure_since() {
    figure "$1" "$(python3 -c "print(f'{$3 * 1e9 / ($(now) - $2):.2f}')")" "$4"
}
drop() { sync; echo 3 > /proc/sys/vm/drop_caches; }
# fio NAME FIELD UNIT OPTION...: one field of fio's terse lines, version 3
fio_figure() {
    name=$1 field=$2 unit=$3
    shift 3
    line=$(fio --name=t --output-format=terse --terse-version=3 --time_based --runtime=6 --ramp_time=1 "$@")
    figure "$name" "$(printf '%s' "$line" | cut -d';' -f"$field")" "$unit"
}

block() {
    set -- --filename=/dev/vda --size=192m --direct=1 --ioengine=libaio
    fio --name=fill "$@" --rw=write --bs=1m > /dev/null
    fio_figure '4 KiB random read, 1 deep' 8 IOPS "$@" --rw=randread --bs=4k --iodepth=1
    fio_figure '4 KiB random read, 16 deep' 8 IOPS "$@" --rw=randread --bs=4k --iodepth=16
    fio_figure '4 KiB random write, 16 deep' 49 IOPS "$@" --rw=randwrite --bs=4k --iodepth=16
    fio_figure 'sequential read, 128 KiB' 7 KiB/s "$@" --rw=read --bs=128k --iodepth=4
    fio_figure 'sequential write, 128 KiB' 48 KiB/s "$@" --rw=write --bs=128k --iodepth=4
}

stream() {
    start=$(now)
    dd if=/dev/zero of="$dir/stream" bs=1M count=96 conv=fsync 2> /dev/null
    figure_since 'write of a file' "$start" 96 MiB/s
    drop
    start=$(now)
    dd if="$dir/stream" of=/dev/null bs=1M 2> /dev/null
    figure_since 'read of a file, cold' "$start" 96 MiB/s
    start=$(now)
    dd if="$dir/stream" of=/dev/null bs=1M 2> /dev/null
    figure_since 'read of a file, again' "$start" 96 MiB/s
    rm "$dir/stream"
    set -- --directory="$dir" --size=64m --filename=random
    fio --name=fill "$@" --rw=write --bs=1m > /dev/null
    drop
    fio_figure '4 KiB random read of a file, direct' 8 IOPS "$@" --direct=1 --rw=randread --bs=4k
    fio_figure '4 KiB random write of a file' 49 IOPS "$@" --rw=randwrite --bs=4k
    fio_figure '4 KiB random write of a mapped file' 49 IOPS "$@" --ioengine=mmap --rw=randwrite --bs=4k
    rm "$dir/random"
}

tree() {
    count=$(tar tf "$dir/tree.tar" | wc -l)
    mkdir "$dir/out"
    start=$(now)
    tar xf "$dir/tree.tar" -C "$dir/out"
    figure_since 'files unpacked' "$start" "$count" 1/s
    drop
    start=$(now)
    find "$dir/out" -type f -size +1000M
    figure_since 'files found and looked at, cold' "$start" "$count" 1/s
    drop
    start=$(now)
    find "$dir/out" -type f -exec cat {} + > /dev/null
    figure_since 'files read, cold' "$start" "$count" 1/s
    start=$(now)
    rm -r "$dir/out"
    figure_since 'files removed' "$start" "$count" 1/s
}

sockets() {
    python3 "$dir/sockets.py" guest
}

interrupts() {
    python3 "$dir/interrupts.py" guest /dev/vda
}

"$part"
