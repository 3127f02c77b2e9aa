// kine serves the etcd API over SQL as a rival in measurements: the published program, unchanged.
package main

import (
	"log"
	"os"

	"github.com/k3s-io/kine/pkg/app"
)

func main() {
	app := app.New()
	if err := app.Run(os.Args); err != nil {
		log.Fatal(err)
	}
}
