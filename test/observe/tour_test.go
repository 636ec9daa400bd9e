package observe

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/internal/kube"
)

// TestTour follows docs/tour.md from its second step on: the demo stays, and what
// the page has one type does what the page says. What kubectl would send is sent
// by a client, with the page's own annotations and manifest.
func TestTour(t *testing.T) {
	page, err := os.ReadFile("../../docs/tour.md")
	must(t, err)
	demo := exec.Command(hearth, "demo", "--stay")
	demo.Stderr = t.Output()
	out, err := demo.StdoutPipe()
	must(t, err)
	must(t, demo.Start())
	var said strings.Builder
	var mu sync.Mutex
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			mu.Lock()
			said.WriteString(lines.Text() + "\n")
			mu.Unlock()
		}
	}()
	t.Cleanup(func() { _ = demo.Process.Kill(); <-ended })
	var kubeconfig, address string
	eventually(t, "the demo to say that it stays", 4*time.Minute, func() error {
		mu.Lock()
		defer mu.Unlock()
		k := regexp.MustCompile(`export KUBECONFIG=(\S+)`).FindStringSubmatch(said.String())
		a := regexp.MustCompile(`--address (http://\S+)`).FindStringSubmatch(said.String())
		if k == nil || a == nil || !strings.Contains(said.String(), "demo ok:") {
			return fmt.Errorf("it said\n%s", said.String())
		}
		kubeconfig, address = k[1], a[1]
		return nil
	})
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	must(t, err)
	c, err := kube.NewClient(config)
	must(t, err)
	pods, err := kubernetes.NewForConfig(config)
	must(t, err)
	if text := tool(t, hearth, "explain", "--address", address); !strings.Contains(text, "runners-large: target size 2") {
		t.Errorf("explain says\n%s", text)
	}

	// The page's annotations, one after the other.
	annotate := regexp.MustCompile(`kubectl annotate rng (\S+) (hearth\.dev/\S+)=(\S+)`).FindAllSubmatch(page, -1)
	if len(annotate) != 3 {
		t.Fatalf("the page has %d annotations", len(annotate))
	}
	set := func(m [][]byte) {
		t.Helper()
		patch := fmt.Appendf(nil, `{"metadata":{"annotations":{%q:%q}}}`, m[2], m[3])
		must(t, c.Patch(t.Context(), group(t, c, string(m[1])), client.RawPatch(types.MergePatchType, patch)))
	}
	set(annotate[0])
	set(annotate[1])
	eventually(t, "both nodes to be parked", 2*time.Minute, func() error {
		if g := group(t, c, "runners-large"); g.Status.Parked != 2 {
			return fmt.Errorf("%d are parked\n%s", g.Status.Parked, tool(t, hearth, "explain", "--address", address))
		}
		return nil
	})

	// The page's job.
	manifest := regexp.MustCompile(`(?s)<<'POD'\n(.*?)\nPOD\n`).FindSubmatch(page)
	if manifest == nil {
		t.Fatal("the page has no job")
	}
	var job corev1.Pod
	must(t, yaml.UnmarshalStrict(manifest[1], &job))
	_, err = pods.CoreV1().Pods(metav1.NamespaceDefault).Create(t.Context(), &job, metav1.CreateOptions{})
	must(t, err)
	eventually(t, "the job to run", 90*time.Second, func() error {
		p, err := pods.CoreV1().Pods(metav1.NamespaceDefault).Get(t.Context(), job.Name, metav1.GetOptions{})
		if err == nil && p.Status.Phase != corev1.PodRunning {
			err = fmt.Errorf("it is %s", p.Status.Phase)
		}
		return err
	})
	if g := group(t, c, "runners-large"); g.Status.Parked != 1 {
		t.Errorf("%d nodes are parked while one was to come back", g.Status.Parked)
	}
	if text := tool(t, hearth, "explain", "pod", "default/job", "--address", address); !strings.Contains(text, "acme/api") {
		t.Errorf("explain pod says\n%s", text)
	}

	// The page's mistake.
	set(annotate[2])
	eventually(t, "the mistake to be told", 30*time.Second, func() error {
		for _, condition := range group(t, c, "runners-large").Status.Conditions {
			if condition.Type == "AnnotationsValid" && condition.Status == metav1.ConditionFalse && strings.Contains(condition.Message, "min-warm") {
				return nil
			}
		}
		return fmt.Errorf("it is not")
	})

	must(t, demo.Process.Signal(syscall.SIGINT))
	<-ended
	if err := demo.Wait(); err != nil {
		t.Errorf("Ctrl-C: %v", err)
	}
}

// group is a node group's object.
func group(t *testing.T, c client.Client, name string) *v1alpha1.RunnerNodeGroup {
	t.Helper()
	var list v1alpha1.RunnerNodeGroupList
	must(t, c.List(context.WithoutCancel(t.Context()), &list))
	for i := range list.Items {
		if list.Items[i].Spec.ID == name || list.Items[i].Name == name {
			return &list.Items[i]
		}
	}
	t.Fatalf("no RunnerNodeGroup %s", name)
	return nil
}
