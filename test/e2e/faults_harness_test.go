package e2e

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"
	admissionregistration "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/internal/playground"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/protos/externalgrpc"
)

// alone makes the only replica lead at once when it is started again, rather
// than wait for the lease of its earlier life to end.
const alone = "leaderElection: {enabled: false}\n"

// fleet declares several groups, each like that of runners.
func fleet(bootDelay string, annotations string, groups ...string) string {
	text := fmt.Sprintf("backend:\n  kwok: {bootDelay: %s, resumeDelay: 1s}\nnodeGroups:\n", bootDelay)
	for _, group := range groups {
		text += fmt.Sprintf(`- id: %s
  max: 10
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}}
  annotations: {%s}
`, group, annotations)
	}
	return text
}

// accounted fails until the group is at rest with n nodes, and everybody agrees
// on them: the cloud, the cluster and the record, from which the autoscaler is
// told; and until exactly launched instances have ever been launched.
func (g *ground) accounted(group string, n, launched int) func() error {
	return func() error {
		snapshot, err := g.cloud.Snapshot(g.ctx)
		if err != nil {
			return err
		}
		cloud := snapshot.Groups[model.GroupID(group)]
		nodes, err := g.nodes(group)
		if err != nil {
			return err
		}
		rng, err := g.group(group)
		if err != nil {
			return err
		}
		var list v1alpha1.RunnerNodeList
		if err := g.Client.List(g.ctx, &list); err != nil {
			return err
		}
		instances, registered, kept := map[string]string{}, map[string]string{}, map[string]string{}
		for _, i := range cloud.Instances {
			instances[string(i.ID)] = string(i.State)
		}
		for _, node := range nodes {
			registered[node.Spec.ProviderID] = string(model.InstanceRunning)
		}
		for _, rn := range list.Items {
			if rn.Spec.NodeGroup != group {
				continue
			}
			kept[rn.Spec.ProviderID] = string(model.InstanceRunning)
			if rn.Status.Phase != string(model.PhaseReady) || rn.Spec.Desired != string(model.DesiredRunning) || rn.Status.Hidden {
				err = errors.Join(err, fmt.Errorf("RunnerNode %s is %s, desired %s, hidden %t", rn.Name, rn.Status.Phase, rn.Spec.Desired, rn.Status.Hidden))
			}
		}
		s := rng.Status
		if cloud.Desired != n || s.Target != n || s.Hidden != 0 || s.Ready != n || len(s.Intents) > 0 {
			err = errors.Join(err, fmt.Errorf("the cloud works towards %d; the record has target %d, %d hidden, %d ready, intents %v", cloud.Desired, s.Target, s.Hidden, s.Ready, s.Intents))
		}
		if len(instances) != n || !maps.Equal(instances, registered) || !maps.Equal(instances, kept) {
			err = errors.Join(err, fmt.Errorf("instances %v, nodes of %v, RunnerNodes of %v", instances, slices.Sorted(maps.Keys(registered)), slices.Sorted(maps.Keys(kept))))
		}
		if ever := g.Instances(group); ever != launched {
			err = errors.Join(err, fmt.Errorf("%d instances were launched", ever))
		}
		if err = errors.Join(err, g.readyNodes(group, n)()); err != nil {
			return fmt.Errorf("%s, want %d nodes of %d ever launched: %w", group, n, launched, err)
		}
		return nil
	}
}

// intents fails until the group's record means n instances to go, all of them
// at the stage.
func (g *ground) intents(group, stage string, n int) func() error {
	return func() error {
		rng, err := g.group(group)
		if err != nil {
			return err
		}
		for _, i := range rng.Status.Intents {
			if i.Stage != stage {
				return fmt.Errorf("%s is at stage %s, want %s", i.InstanceID, i.Stage, stage)
			}
		}
		if len(rng.Status.Intents) != n {
			return fmt.Errorf("%s has %d intents, want %d", group, len(rng.Status.Intents), n)
		}
		return nil
	}
}

// cloudHas fails until the cloud works towards so many instances of the group,
// and has so many in the state.
func (g *ground) cloudHas(group string, desired, n int, state model.InstanceState) func() error {
	return func() error {
		snapshot, err := g.cloud.Snapshot(g.ctx)
		if err != nil {
			return err
		}
		cloud := snapshot.Groups[model.GroupID(group)]
		in := 0
		for _, i := range cloud.Instances {
			if i.State == state {
				in++
			}
		}
		if cloud.Desired != desired || in != n {
			return fmt.Errorf("the cloud works towards %d instances of %s and has %d %s, want %d and %d", cloud.Desired, group, in, state, desired, n)
		}
		return nil
	}
}

// all fails as long as one of the conditions does.
func all(conditions ...func() error) func() error {
	return func() error {
		var errs []error
		for _, ok := range conditions {
			errs = append(errs, ok())
		}
		return errors.Join(errs...)
	}
}

// refusal is a write that the API server is to refuse: of a resource, such as
// nodes or nodes/status, when the CEL expression holds.
type refusal struct {
	operation admissionregistration.OperationType
	resource  string
	when      string
}

// cloudRefusals are writes of groups that the cloud is to refuse.
func (g *ground) cloudRefusals(groups ...string) refusal {
	if onAWS() {
		return refusal{resource: "", when: strings.Join(groups, " ")}
	}
	names := make([]string, 0, len(groups))
	for _, group := range groups {
		names = append(names, strconv.Quote("hearth-kwok-"+group))
	}
	return refusal{admissionregistration.Update, "configmaps", "object.metadata.name in [" + strings.Join(names, ", ") + "]"}
}

// refuse has the API server refuse writes until allow is called, so that what
// would come after them does not happen meanwhile.
func (g *ground) refuse(refusals ...refusal) (allow func()) {
	g.t.Helper()
	api := g.Kube.AdmissionregistrationV1()
	var names []string
	for _, r := range refusals {
		if r.resource == "" {
			g.cloud.(*amazon).refuse(strings.Fields(r.when))
			continue
		}
		name := "refusal-" + strings.ToLower(rand.Text()[:8])
		names = append(names, name)
		rule := func(operation admissionregistration.OperationType, resource string, names ...string) admissionregistration.NamedRuleWithOperations {
			return admissionregistration.NamedRuleWithOperations{
				ResourceNames: names,
				RuleWithOperations: admissionregistration.RuleWithOperations{
					Operations: []admissionregistration.OperationType{operation},
					Rule:       admissionregistration.Rule{APIGroups: []string{"*"}, APIVersions: []string{"*"}, Resources: []string{resource}},
				},
			}
		}
		_, err := api.ValidatingAdmissionPolicies().Create(g.ctx, &admissionregistration.ValidatingAdmissionPolicy{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: admissionregistration.ValidatingAdmissionPolicySpec{
				MatchConstraints: &admissionregistration.MatchResources{ResourceRules: []admissionregistration.NamedRuleWithOperations{
					rule(r.operation, r.resource),
					rule(admissionregistration.Create, "configmaps", name), // see below
				}},
				Validations: []admissionregistration.Validation{{
					Expression: fmt.Sprintf("!(request.name == %q || (%s))", name, r.when),
					Message:    "refused by a test",
				}},
			},
		}, metav1.CreateOptions{})
		g.must(err)
		_, err = api.ValidatingAdmissionPolicyBindings().Create(g.ctx, &admissionregistration.ValidatingAdmissionPolicyBinding{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: admissionregistration.ValidatingAdmissionPolicyBindingSpec{
				PolicyName: name, ValidationActions: []admissionregistration.ValidationAction{admissionregistration.Deny},
			},
		}, metav1.CreateOptions{})
		g.must(err)
	}
	g.eventually("the refusals to be in force", 10*time.Second, func() error {
		for _, name := range names {
			// It takes a moment until the API server heeds a new policy.
			probe := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}
			if _, err := g.Kube.CoreV1().ConfigMaps(metav1.NamespaceDefault).Create(g.ctx, probe, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err == nil {
				return fmt.Errorf("%s is not", name)
			}
		}
		return nil
	})
	return func() {
		g.t.Helper()
		if a, ok := g.cloud.(*amazon); ok {
			a.SetFault(nil)
		}
		for _, name := range names {
			g.must(errors.Join(
				api.ValidatingAdmissionPolicyBindings().Delete(g.ctx, name, metav1.DeleteOptions{}),
				api.ValidatingAdmissionPolicies().Delete(g.ctx, name, metav1.DeleteOptions{}),
			))
		}
	}
}

// pauseAPIServer has the API server do nothing until resume is called: its
// connections stay open, and nothing is answered on them.
func (g *ground) pauseAPIServer() (resume func()) {
	g.t.Helper()
	_, port, _ := strings.Cut(strings.TrimPrefix(g.Cluster.AdminConfig().Host, "https://"), ":")
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	g.must(err)
	for _, file := range files {
		line, err := os.ReadFile(file)
		args := strings.Split(string(line), "\x00")
		if err != nil || filepath.Base(args[0]) != "kube-apiserver" || !slices.Contains(args, "--secure-port="+port) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		g.must(err)
		g.must(syscall.Kill(pid, syscall.SIGSTOP))
		resume = sync.OnceFunc(func() { g.must(syscall.Kill(pid, syscall.SIGCONT)) })
		g.t.Cleanup(resume)
		return resume
	}
	g.t.Fatal("the API server's process was not found")
	return nil
}

// dial dials an address as a client that shows the certificates, and trusts
// the playground's authority.
func (g *ground) dial(address string, certificates ...tls.Certificate) *grpc.ClientConn {
	g.t.Helper()
	cfg, err := g.Authority.ClientTLS(nil)
	g.must(err)
	if len(certificates) > 0 {
		// Shown whatever authorities the server says it accepts.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &certificates[0], nil }
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	g.must(err)
	g.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// certificate issues a client's certificate.
func (g *ground) certificate(authority *playground.Authority, name string) tls.Certificate {
	g.t.Helper()
	pair, err := authority.Issue(name)
	g.must(err)
	cert, err := tls.LoadX509KeyPair(pair.Cert, pair.Key)
	g.must(err)
	return cert
}

// health asks a replica whether it serves.
func (g *ground) health(conn *grpc.ClientConn) (grpc_health_v1.HealthCheckResponse_ServingStatus, error) {
	ctx, cancel := context.WithTimeout(g.ctx, 5*time.Second)
	defer cancel()
	answer, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true))
	return answer.GetStatus(), err
}

// restart ends the replica as kill -9 does, calls between, and starts it again.
func (g *ground) restart(p *playground.Provider, between func()) {
	g.t.Helper()
	p.Kill()
	between()
	g.must(p.Restart())
	g.must(p.Serving(g.ctx, 30*time.Second))
}

// requests returns how many requests of a method the replica has begun to
// serve, and how many it has answered.
func (g *ground) requests(p *playground.Provider, method string) (begun, answered float64) {
	g.t.Helper()
	text, err := p.Metrics(g.ctx)
	g.must(err)
	label := fmt.Sprintf("grpc_method=%q", method)
	return metric(text, "grpc_server_started_total", label), metric(text, "grpc_server_handled_total", label)
}

// read is one of the requests by which an autoscaler learns what there is.
type read struct {
	name string
	do   func(context.Context, externalgrpc.CloudProviderClient) error
}

// reads are those for a group and one of its nodes.
func reads(group string, node *externalgrpc.ExternalGrpcNode) []read {
	type client = externalgrpc.CloudProviderClient
	return []read{
		{"Refresh", func(ctx context.Context, c client) error {
			_, err := c.Refresh(ctx, &externalgrpc.RefreshRequest{})
			return err
		}},
		{"NodeGroups", func(ctx context.Context, c client) error {
			answer, err := c.NodeGroups(ctx, &externalgrpc.NodeGroupsRequest{})
			if err == nil && len(answer.GetNodeGroups()) == 0 {
				err = errors.New("no groups")
			}
			return err
		}},
		{"NodeGroupForNode", func(ctx context.Context, c client) error {
			answer, err := c.NodeGroupForNode(ctx, &externalgrpc.NodeGroupForNodeRequest{Node: node})
			if err == nil && answer.GetNodeGroup().GetId() != group {
				err = fmt.Errorf("the node is said to be of group %q", answer.GetNodeGroup().GetId())
			}
			return err
		}},
		{"NodeGroupTargetSize", func(ctx context.Context, c client) error {
			answer, err := c.NodeGroupTargetSize(ctx, &externalgrpc.NodeGroupTargetSizeRequest{Id: group})
			if err == nil && answer.GetTargetSize() == 0 {
				err = errors.New("no target size")
			}
			return err
		}},
		{"NodeGroupNodes", func(ctx context.Context, c client) error {
			answer, err := c.NodeGroupNodes(ctx, &externalgrpc.NodeGroupNodesRequest{Id: group})
			if err == nil && len(answer.GetInstances()) == 0 {
				err = errors.New("no instances")
			}
			return err
		}},
		{"NodeGroupGetOptions", func(ctx context.Context, c client) error {
			_, err := c.NodeGroupGetOptions(ctx, &externalgrpc.NodeGroupAutoscalingOptionsRequest{
				Id: group, Defaults: &externalgrpc.NodeGroupAutoscalingOptions{},
			})
			return err
		}},
		{"NodeGroupTemplateNodeInfo", func(ctx context.Context, c client) error {
			_, err := c.NodeGroupTemplateNodeInfo(ctx, &externalgrpc.NodeGroupTemplateNodeInfoRequest{Id: group})
			return err
		}},
	}
}

// tally is what came of many requests.
type tally struct {
	mu      sync.Mutex
	good    map[string]int
	failed  []error
	slowest time.Duration
}

func (t *tally) count(name string, took time.Duration, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.good == nil {
		t.good = map[string]int{}
	}
	t.slowest = max(t.slowest, took)
	if err != nil {
		t.failed = append(t.failed, fmt.Errorf("%s after %s: %w", name, took.Round(time.Millisecond), err))
		return
	}
	t.good[name]++
}

func (t *tally) result() (good map[string]int, failed []error, slowest time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.good), slices.Clone(t.failed), t.slowest
}

// load makes requests, one after the other, until stop is called. Each has as
// long as an autoscaler gives it.
func (g *ground) load(t *tally, pause time.Duration, connect func() (externalgrpc.CloudProviderClient, func()), requests []read) (stop func()) {
	ctx, cancel := context.WithCancel(g.ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			client, hangUp := connect()
			for _, r := range requests {
				call, end := context.WithTimeout(ctx, 5*time.Second)
				began := time.Now()
				err := r.do(call, client)
				end()
				if ctx.Err() != nil {
					break
				}
				t.count(r.name, time.Since(began), err)
			}
			hangUp()
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
		}
	}()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	g.t.Cleanup(stop)
	return stop
}
