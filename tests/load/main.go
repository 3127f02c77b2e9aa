// etcdload drives any server of the etcd API with etcd's own client, the way kube-apiserver does,
// and prints one JSON line: rate, latencies, and the server's CPU time and memory.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"
)

// options say what is driven, and how hard.
type options struct {
	endpoint  string
	mode      string
	conns     int
	clients   int
	warmUp    time.Duration
	duration  time.Duration
	timeout   time.Duration
	interval  time.Duration
	rate      float64
	valueSize int
	keys      int
	limit     int64
	watchers  int
	prefix    string
	spread    int
	pids      []string
	since     int64
}

func parse() options {
	var o options
	flag.StringVar(&o.endpoint, "endpoint", "127.0.0.1:2379", "server")
	flag.StringVar(&o.mode, "mode", "create",
		"put, create, update, get, list, page, compact, fanout, fill, first or scan")
	flag.IntVar(&o.conns, "conns", 10, "connections")
	flag.IntVar(&o.clients, "clients", 100, "requests in flight")
	flag.DurationVar(&o.warmUp, "warm-up", 1500*time.Millisecond, "time before the measured time")
	flag.DurationVar(&o.duration, "duration", 8*time.Second, "measured time")
	flag.DurationVar(&o.timeout, "timeout", 34*time.Second, "time for one request")
	flag.DurationVar(&o.interval, "interval", time.Second, "compact: time between compactions")
	flag.Float64Var(&o.rate, "rate", 0, "requests per second of an open loop; 0 is a closed loop")
	flag.IntVar(&o.valueSize, "size", 1024, "bytes of a value")
	flag.IntVar(&o.keys, "keys", 10000, "keys to fill or to read")
	flag.Int64Var(&o.limit, "limit", 500, "list, page: keys in an answer; 0 is all")
	flag.IntVar(&o.watchers, "watchers", 100, "fanout: watchers")
	flag.StringVar(&o.prefix, "prefix", "/registry/pods/", "prefix of all keys")
	flag.IntVar(&o.spread, "spread", 0, "create, update: folders below the prefix, 0/ and so on")
	flag.Int64Var(&o.since, "since", 0, "first: when the server was started, in Unix nanoseconds")
	pids := flag.String("pids", "", "processes of the server, separated by commas")
	flag.Parse()
	if *pids != "" {
		o.pids = strings.Split(*pids, ",")
	}
	return o
}

func main() {
	o := parse()
	result, err := run(o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "etcdload:", err)
		os.Exit(1)
	}
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		fmt.Fprintln(os.Stderr, "etcdload:", err)
		os.Exit(1)
	}
}

func run(o options) (any, error) {
	if o.mode == "first" {
		return first(o)
	}
	clients, err := dial(o)
	if err != nil {
		return nil, err
	}
	switch o.mode {
	case "fill":
		return fill(o, clients)
	case "scan":
		return scan(o, clients[0])
	case "fanout":
		return fanout(o, clients)
	default:
		operate, err := operation(o)
		if err != nil {
			return nil, err
		}
		return drive(o, clients, operate), nil
	}
}

// key is the name of the i-th object, spread over namespaces.
func (o options) key(i int) string {
	const namespaces = 50
	return fmt.Sprintf("%stenant-%03d/sandbox-%08d", o.prefix, i%namespaces, i)
}

// value is an object of the size asked for, as compressible as Kubernetes' objects are.
func (o options) value() string {
	const part = `{"kind":"Sandbox","metadata":{"name":"sb","labels":{"pool":"py"}},"status":{}} `
	return strings.Repeat(part, o.valueSize/len(part)+1)[:o.valueSize]
}
