package kube

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubeadm "k8s.io/kubernetes/cmd/kubeadm/app/util/config"
	kindconfig "sigs.k8s.io/kind/pkg/apis/config/v1alpha4"
	"sigs.k8s.io/yaml"
)

const deploy = "../../deploy"

// fault is a change of a file that whatever reads the file must refuse.
type fault struct{ file, right, wrong string }

// content is the file below deploy/ with the fault in it.
func (f fault) content(t *testing.T) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(deploy, f.file))
	check(t, err)
	if count := strings.Count(string(content), f.right); count != 1 {
		t.Fatalf("%s has %q %d times", f.file, f.right, count)
	}
	return strings.Replace(string(content), f.right, f.wrong, 1)
}

// TestManifests applies deploy/kubernetes: the API server knows every field and
// takes every value, and the pod is one that the restricted standard admits.
func TestManifests(t *testing.T) {
	c := newCluster(t)
	namespace := c.namespace(t, "manifests")
	apply := func(path string) (string, error) {
		out, err := exec.Command("bin/kubectl", "--kubeconfig", c.api.Kubeconfig,
			"--namespace", namespace, "apply", "--validate=strict", "--filename", path,
		).CombinedOutput()
		return string(out), err
	}
	if out, err := apply(filepath.Join(deploy, "kubernetes")); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	set, err := c.typed.AppsV1().StatefulSets(namespace).Get(c.ctx, "kvstore", metav1.GetOptions{})
	check(t, err)
	for _, f := range []fault{
		{"kubernetes/statefulset.yaml", "readOnlyRootFilesystem", "readOnlyRootFileSystem"},
		{"kubernetes/statefulset.yaml", "type: RuntimeDefault", "type: Default"},
		{"kubernetes/service.yaml", "targetPort: client", "targetPort: client_port"},
		{"kubernetes/poddisruptionbudget.yaml", "minAvailable: 1", "minAvailable: -1"},
		{"kubernetes/configmap.yaml", "data:\n  shards", "dat:\n  shards"},
	} {
		path := filepath.Join(t.TempDir(), "faulty.yaml")
		check(t, os.WriteFile(path, []byte(f.content(t)), 0o600))
		if out, err := apply(path); err == nil {
			t.Errorf("%s with %q was taken:\n%s", f.file, f.wrong, out)
		}
	}
	admitted(t, c, set.Spec.Template.Spec)
}

func admitted(t *testing.T, c *cluster, spec corev1.PodSpec) {
	t.Helper()
	restricted := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name:   "restricted",
		Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"},
	}}
	_, err := c.typed.CoreV1().Namespaces().Create(c.ctx, restricted, metav1.CreateOptions{})
	check(t, err)
	data := corev1.Volume{Name: "data"} // the StatefulSet makes it of its claim
	data.EmptyDir = &corev1.EmptyDirVolumeSource{}
	spec.Volumes = append(spec.Volumes, data)
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "kvstore-0"}, Spec: spec}
	create := func() error {
		_, err := c.typed.CoreV1().Pods(restricted.Name).Create(
			c.ctx, pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	check(t, create())
	pod.Spec.SecurityContext.RunAsNonRoot = nil
	if err := create(); !errors.IsForbidden(err) {
		t.Errorf("a pod that may be root was answered with %v", err)
	}
}

// TestKubeadm asks kubeadm's own `config validate` for the configurations that
// point a cluster at the store.
func TestKubeadm(t *testing.T) {
	const file = "kubeadm/config.yaml"
	content, err := os.ReadFile(filepath.Join(deploy, file))
	check(t, err)
	check(t, kubeadm.ValidateConfig(content, false))
	for _, f := range []fault{
		{file, "    endpoints:", "    endpoint:"},
		{file, "https://store.example:2379", "store.example"},
		{file, "    certFile:", "    #"},
	} {
		if kubeadm.ValidateConfig([]byte(f.content(t)), false) == nil {
			t.Errorf("a configuration with %q was taken", f.wrong)
		}
	}
}

// TestKind reads the configuration of kind as kind does, without a field that it
// does not know, and what it hands on to kubeadm.
func TestKind(t *testing.T) {
	const file = "kind/cluster.yaml"
	content, err := os.ReadFile(filepath.Join(deploy, file))
	check(t, err)
	var cluster kindconfig.Cluster
	check(t, yaml.UnmarshalStrict(content, &cluster))
	patch := "apiVersion: kubeadm.k8s.io/v1beta4\nkubernetesVersion: v1.34.0\n" +
		cluster.Nodes[0].KubeadmConfigPatches[0]
	check(t, kubeadm.ValidateConfig([]byte(patch), false))
	patch = strings.Replace(patch, "endpoints:", "endpoint:", 1)
	if kubeadm.ValidateConfig([]byte(patch), false) == nil {
		t.Error("a patch with a field that kubeadm does not know was taken")
	}
	f := fault{file, "kubeadmConfigPatches", "kubeadmConfigPatch"}
	if yaml.UnmarshalStrict([]byte(f.content(t)), &cluster) == nil {
		t.Error("a configuration with a field that kind does not know was taken")
	}
}
