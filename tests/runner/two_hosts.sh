# Run the words of a command on two hosts at once: `first` and `second`, which have a network and a
# name each and share the disk. Between them is a cable, which is pulled when the file CUT is there.
#
# unshare --map-root-user --mount --net --uts sh two_hosts.sh CUT COMMAND...
cut=$1
shift
echo "127.0.0.1 localhost
10.77.0.1 first
10.77.0.2 second" >"$cut.names"
mount --bind "$cut.names" /etc/hosts
hostname first
unshare --net --uts sh -c '
    hostname second
    until ip address add 10.77.0.2/24 dev cable-2 2>/dev/null; do sleep 0.05; done
    ip link set lo up && ip link set cable-2 up && exec "$@"' sh "$@" &
second=$!
until [ "$(readlink /proc/$second/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
ip link add name cable-1 type veth peer name cable-2 netns "$second"
ip address add 10.77.0.1/24 dev cable-1 && ip link set lo up && ip link set cable-1 up
(until [ -e "$cut" ]; do sleep 0.05; done; ip link set cable-1 down) &
cutter=$!
"$@"
code=$?
kill "$cutter" 2>/dev/null
wait "$second" || code=$?
exit $code
