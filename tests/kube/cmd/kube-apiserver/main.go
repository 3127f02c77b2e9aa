// Command kube-apiserver is the unmodified API server of the module's Kubernetes
// version with one clock turned: the watch caches are compared with the store
// every ten seconds instead of every five minutes, so that a short test run
// sees the comparison succeed, or fail, several times per resource.
package main

import (
	"os"
	"time"
	_ "time/tzdata" // CronJob admission resolves time zones without a system database

	"k8s.io/apiserver/pkg/storage/cacher"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/metrics/prometheus/clientgo" // client and work queue metrics
	_ "k8s.io/component-base/metrics/prometheus/version"  // the version metric
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

const consistencyCheckPeriod = 10 * time.Second

func main() {
	cacher.ConsistencyCheckPeriod = consistencyCheckPeriod
	os.Exit(cli.Run(app.NewAPIServerCommand()))
}
