package e2e

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/internal/playground"
)

const webhookSecret = canary + "-webhook"

// hub sends GitHub's webhooks to a provider.
type hub struct {
	*ground
	provider *playground.Provider
}

// tell sends a workflow_job event of the job with that number, for runners with
// a label.
func (h hub) tell(action, label string, job int) {
	h.t.Helper()
	at := time.Now().UTC().Format(time.RFC3339)
	body := fmt.Sprintf(`{"action":%q,"workflow_job":{"id":%d,"run_id":1,"workflow_name":"CI","status":%q,"created_at":%q,"started_at":%q,"labels":["self-hosted",%q]},
"repository":{"id":1,"name":"shop","full_name":"acme/shop"}}`, action, job, action, at, at, label)
	mac := hmac.New(sha256.New, []byte(webhookSecret))
	mac.Write([]byte(body))
	r, err := http.NewRequestWithContext(h.ctx, http.MethodPost, "http://"+h.provider.HTTPAddress+"/webhooks/github", strings.NewReader(body))
	h.must(err)
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("X-GitHub-Event", "workflow_job")
	r.Header.Set("X-Hub-Signature-256", "sha256="+hex.EncodeToString(mac.Sum(nil)))
	response, err := http.DefaultClient.Do(r)
	h.must(err)
	text, _ := io.ReadAll(response.Body)
	_ = response.Body.Close()
	if response.StatusCode != http.StatusAccepted {
		h.t.Fatalf("%s of job %d: %s %s", action, job, response.Status, text)
	}
}

// TestQueuedJobsGetNodesBeforeTheirPods: twenty jobs are queued in each of two
// groups, and their pods come five seconds later. In the group that prescales
// the nodes are on their way by then, and cluster-autoscaler takes them over. In
// a third group the jobs are cancelled before their pods come: what was started
// for them goes as any idle node does.
func TestQueuedJobsGetNodesBeforeTheirPods(t *testing.T) {
	const jobs, cancelled = 20, 3
	g := newGround(t)
	secret := filepath.Join(t.TempDir(), "secret")
	g.must(os.WriteFile(secret, []byte(webhookSecret+"\n"), 0o600))
	groups := fmt.Sprintf("ci: {github: {webhookSecretFile: %q}}\nbackend: {kwok: {bootDelay: 12s}}\nnodeGroups:\n", secret)
	for _, name := range []string{"early", "late", "cancelled"} {
		prescale := map[bool]string{true: "off", false: "on"}[name == "late"]
		groups += fmt.Sprintf(`- id: %s
  max: 30
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}}
  annotations: {hearth.dev/role: runner, hearth.dev/runner-labels: "self-hosted,%s", hearth.dev/prescale: %q, hearth.dev/max-idle: 2s, hearth.dev/scale-down-unneeded-time: 1s}
`, name, name, prescale)
	}
	h := hub{g, g.Provider("provider", groups)}
	g.Autoscaler(nil)

	// A control plane that has just started takes its time for the first write.
	g.eventually("the first record", 30*time.Second, func() error {
		_, err := g.group("early")
		return err
	})
	queued := time.Now()
	for i := range jobs {
		h.tell("queued", "early", 100+i)
		h.tell("queued", "late", 200+i)
	}
	for i := range cancelled {
		h.tell("queued", "cancelled", 300+i)
	}
	g.eventually("nodes for the queued jobs", 20*time.Second, func() error {
		for group, n := range map[string]int{"early": jobs, "late": 0, "cancelled": cancelled} {
			if got := len(g.cloudGroup(group).Instances); got != n {
				return fmt.Errorf("%d instances of %s, want %d", got, group, n)
			}
			if err := g.sizes(group, 0, n)(); err != nil {
				return err
			}
		}
		return nil
	})
	for i := range cancelled {
		h.tell("completed", "cancelled", 300+i)
	}
	time.Sleep(time.Until(queued.Add(5 * time.Second))) // as long as a runner controller takes
	for _, group := range []string{"early", "late"} {
		for i := range jobs {
			g.submit(playground.Job{Name: fmt.Sprintf("%s-%d", group, i), Group: group, Key: "acme/shop", CPU: "6"})
		}
	}
	waits := map[string][]time.Duration{}
	running := map[string]bool{}
	g.eventually("the pods to run", 90*time.Second, func() error {
		list, err := g.Kube.CoreV1().Pods(metav1.NamespaceDefault).List(g.ctx, metav1.ListOptions{LabelSelector: "app=ci-runner"})
		if err != nil {
			return err
		}
		for _, pod := range list.Items {
			if pod.Status.Phase == corev1.PodRunning && !running[pod.Name] {
				running[pod.Name] = true
				group, _, _ := strings.Cut(pod.Name, "-")
				waits[group] = append(waits[group], time.Since(queued))
			}
		}
		if len(running) < 2*jobs {
			return fmt.Errorf("%d of %d run", len(running), 2*jobs)
		}
		return nil
	})
	for _, w := range waits {
		slices.Sort(w)
	}
	early, late := waits["early"], waits["late"]
	t.Logf("from queued to running: %.1f s with prescale, %.1f s without (median): %.2f ×", early[jobs/2].Seconds(), late[jobs/2].Seconds(),
		early[jobs/2].Seconds()/late[jobs/2].Seconds())
	for i := range jobs {
		h.tell("in_progress", "early", 100+i)
	}
	for _, group := range []string{"early", "late"} {
		if nodes, instances := len(g.Launched(group)), g.Instances(group); nodes != jobs || instances != jobs {
			t.Errorf("group %s launched %d instances and %d nodes for %d jobs", group, instances, nodes, jobs)
		}
		g.eventually("the autoscaler's size", 10*time.Second, g.sizes(group, jobs, 0))
	}
	g.eventually("the cancelled jobs' nodes to go", 120*time.Second, func() error {
		if got := g.Instances("cancelled"); got != cancelled {
			return fmt.Errorf("%d instances were launched for %d cancelled jobs", got, cancelled)
		}
		return g.sizes("cancelled", 0, 0)()
	})
	g.noComplaints("cancelled")
}
