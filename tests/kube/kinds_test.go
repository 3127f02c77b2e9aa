package kube

import (
	"fmt"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// The resources that the suite writes. The API server keeps a watch cache of all
// of them but events, whose lists and watches go to the store.
var (
	configMaps = schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}
	events     = schema.GroupVersionResource{Version: "v1", Resource: "events"}
	leases     = schema.GroupVersionResource{
		Group: "coordination.k8s.io", Version: "v1", Resource: "leases",
	}
	sandboxes = schema.GroupVersionResource{
		Group: "suite.test", Version: "v1", Resource: "sandboxes",
	}
	definitions = schema.GroupVersionResource{
		Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions",
	}
)

// kind is a resource with the constructor of an object that the API server accepts.
type kind struct {
	of    schema.GroupVersionResource
	empty func(name string) *unstructured.Unstructured
}

type fields = map[string]any

func object(apiVersion, kind, name string, content fields) *unstructured.Unstructured {
	o := &unstructured.Unstructured{Object: fields{}}
	for field, value := range content {
		o.Object[field] = value
	}
	o.SetAPIVersion(apiVersion)
	o.SetKind(kind)
	o.SetName(name)
	return o
}

func configMap(name string) *unstructured.Unstructured {
	return object("v1", "ConfigMap", name, nil)
}

func lease(name string) *unstructured.Unstructured {
	return object("coordination.k8s.io/v1", "Lease", name, nil)
}

func sandbox(name string) *unstructured.Unstructured {
	return object("suite.test/v1", "Sandbox", name, fields{"spec": fields{"size": int64(1)}})
}

// event returns a constructor, because an event must name an object in its own namespace.
func event(namespace string) func(name string) *unstructured.Unstructured {
	return func(name string) *unstructured.Unstructured {
		return object("v1", "Event", name, fields{
			"involvedObject": fields{"kind": "Pod", "name": "none", "namespace": namespace},
			"reason":         "Tested",
			"type":           "Normal",
		})
	}
}

// defineSandboxes creates the custom resource and waits until it is served.
func (c *cluster) defineSandboxes(t *testing.T) {
	t.Helper()
	apiVersion, name := definitions.GroupVersion().String(), sandboxes.GroupResource().String()
	definition := object(apiVersion, "CustomResourceDefinition", name, fields{
		"spec": fields{
			"group": sandboxes.Group,
			"scope": "Namespaced",
			"names": fields{
				"plural": "sandboxes", "singular": "sandbox",
				"kind": "Sandbox", "listKind": "SandboxList",
			},
			"versions": []any{fields{
				"name": "v1", "served": true, "storage": true,
				"schema": fields{"openAPIV3Schema": fields{
					"type": "object", "x-kubernetes-preserve-unknown-fields": true,
				}},
			}},
		},
	})
	_, err := c.dynamic.Resource(definitions).Create(c.ctx, definition, metav1.CreateOptions{})
	check(t, err)
	c.eventually(t, "the custom resource is served", conditionWithin, func() error {
		list, err := c.dynamic.Resource(sandboxes).List(c.ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		if n := meta.LenList(list); n > 0 {
			return fmt.Errorf("%d objects of a new resource", n)
		}
		return nil
	})
}
