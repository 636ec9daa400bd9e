package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/internal/aws/awsfake"
	"github.com/hearth-ci/hearth/internal/config"
	"github.com/hearth-ci/hearth/internal/kwok"
	"github.com/hearth-ci/hearth/pkg/model"
)

// onAWS says whether the tests run with the AWS backend: their groups then are
// Auto Scaling groups of a stand-in for AWS.
func onAWS() bool { return os.Getenv("HEARTH_E2E_BACKEND") == "aws" }

// cloud is where instances come from as whoever runs it sees it: past the
// provider.
type cloud interface {
	Snapshot(ctx context.Context) (model.Snapshot, error)
	// SetGroups tells which groups there are.
	SetGroups(groups []model.NodeGroup)
	SetFaults(ctx context.Context, group model.GroupID, faults kwok.Faults) error
	KillInstance(ctx context.Context, id model.InstanceID) error
}

// amazon is a stand-in for AWS whose instances become Nodes.
type amazon struct {
	*awsfake.Cloud
	server *httptest.Server
	kube   kubernetes.Interface

	// bare: kubelets register without the label of their node group, as they do
	// unless they are told of it; Hearth sets it a moment later.
	bare bool

	mu       sync.Mutex
	groups   map[model.GroupID]model.NodeGroup
	deadBoot map[model.GroupID]int // next launches that never register
	dead     map[string]bool       // instances that never register
	up       map[string]bool       // instances whose kubelet runs
	gone     map[string]time.Time  // since when an instance is seen to be terminated
}

func newAmazon(kube kubernetes.Interface) *amazon {
	a := &amazon{
		Cloud: awsfake.New(time.Now(), awsfake.Timing{}), kube: kube,
		groups: map[model.GroupID]model.NodeGroup{}, deadBoot: map[model.GroupID]int{},
		dead: map[string]bool{}, up: map[string]bool{}, gone: map[string]time.Time{},
	}
	a.server = httptest.NewServer(a.Cloud)
	return a
}

// run turns the cloud's time on and plays kubelet and cloud controller, until
// ctx ends.
func (a *amazon) run(ctx context.Context) {
	defer a.server.Close()
	ticker := time.NewTicker(200 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticker.C:
			a.Advance(now)
			a.tend(ctx, now)
		}
	}
}

func nodeName(i awsfake.Instance) string {
	return i.Tags["aws:autoscaling:groupName"] + "-" + strings.TrimLeft(strings.TrimPrefix(i.ID, "i-"), "0")
}

// tend registers the Nodes of instances that run, has those of others not
// Ready, and at last deletes those of terminated ones.
func (a *amazon) tend(ctx context.Context, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, i := range a.All() {
		group := model.GroupID(i.Tags["aws:autoscaling:groupName"])
		if _, known := a.dead[i.ID]; !known {
			a.dead[i.ID] = a.deadBoot[group] > 0
			a.deadBoot[group] = max(0, a.deadBoot[group]-1)
		}
		runs := i.State == "running" && !a.dead[i.ID]
		switch {
		case runs && !a.up[i.ID]:
			a.up[i.ID] = a.register(ctx, a.groups[group], i) == nil
		case !runs && a.up[i.ID]:
			a.up[i.ID] = a.unready(ctx, i, `"true"`) != nil
		case i.State == "terminated" && a.gone[i.ID].IsZero():
			a.gone[i.ID] = now
		case i.State == "terminated" && now.Sub(a.gone[i.ID]) > 2*time.Minute:
			_ = a.kube.CoreV1().Nodes().Delete(ctx, nodeName(i), metav1.DeleteOptions{})
		}
	}
}

func (a *amazon) unready(ctx context.Context, i awsfake.Instance, value string) error {
	patch := fmt.Appendf(nil, `{"metadata":{"annotations":{"kwok.hearth.dev/unready":%s}}}`, value)
	_, err := a.kube.CoreV1().Nodes().Patch(ctx, nodeName(i), types.MergePatchType, patch, metav1.PatchOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

func (a *amazon) refuse(groups []string) {
	of := map[string]string{}
	for _, i := range a.All() {
		of[i.ID] = i.Tags["aws:autoscaling:groupName"]
	}
	a.SetFault(func(c awsfake.Call) awsfake.Fault {
		if strings.HasPrefix(c.Operation, "Describe") {
			return awsfake.None
		}
		for _, name := range append([]string{c.Group}, c.Instances...) {
			if slices.Contains(groups, name) || slices.Contains(groups, of[name]) {
				return awsfake.ServerError
			}
		}
		return awsfake.None
	})
}

func (a *amazon) register(ctx context.Context, g model.NodeGroup, i awsfake.Instance) error {
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{
			Name: nodeName(i), Annotations: map[string]string{"kwok.x-k8s.io/node": "fake"},
			Labels: map[string]string{
				corev1.LabelOSStable: "linux", corev1.LabelArchStable: "amd64", corev1.LabelHostname: nodeName(i),
				corev1.LabelTopologyZone: i.Zone, corev1.LabelInstanceTypeStable: i.Type,
			},
		},
		Spec: corev1.NodeSpec{ProviderID: "aws:///" + i.Zone + "/" + i.ID},
	}
	maps.Copy(node.Labels, g.Template.Labels)
	if !a.bare {
		node.Labels[v1alpha1.NodeGroupLabel] = v1alpha1.GroupLabel(model.GroupID(i.Tags["aws:autoscaling:groupName"]))
	}
	for _, t := range g.Template.Taints {
		node.Spec.Taints = append(node.Spec.Taints, corev1.Taint{Key: t.Key, Value: t.Value, Effect: corev1.TaintEffect(t.Effect)})
	}
	node.Status.Capacity = corev1.ResourceList{}
	for name, quantity := range g.Template.Capacity {
		node.Status.Capacity[corev1.ResourceName(name)] = resource.MustParse(quantity)
	}
	node.Status.Allocatable = node.Status.Capacity
	_, err := a.kube.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return a.unready(ctx, i, "null")
	}
	return err
}

// SetGroups makes an Auto Scaling group of each group that is new.
func (a *amazon) SetGroups(groups []model.NodeGroup) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, g := range groups {
		if _, known := a.groups[g.ID]; known {
			a.Edit(string(g.ID), func(asg *awsfake.Group) { asg.Min, asg.Max = g.Min, g.Max })
			a.groups[g.ID] = g
			continue
		}
		a.groups[g.ID] = g
		const prefix = "k8s.io/cluster-autoscaler/node-template/"
		tags := map[string]string{"k8s.io/cluster-autoscaler/enabled": "true"}
		for name, quantity := range g.Template.Capacity {
			tags[prefix+"resources/"+name] = quantity
		}
		for name, value := range g.Template.Labels {
			tags[prefix+"label/"+name] = value
		}
		for _, t := range g.Template.Taints {
			tags[prefix+"taint/"+t.Key] = t.Value + ":" + t.Effect
		}
		machine := g.Template.InstanceType
		if machine == "" {
			machine = "m5.2xlarge"
		}
		a.AddType(awsfake.InstanceType{Name: machine, VCPUs: 8, MiB: 32768, Arch: "x86_64", Interfaces: 4, Address: 15})
		a.AddTemplate(awsfake.LaunchTemplate{ID: "lt-" + string(g.ID), Default: 1, Versions: []awsfake.TemplateVersion{{InstanceType: machine}}})
		zone := g.Template.Zone
		if zone == "" {
			zone = "a"
		}
		a.AddGroup(awsfake.Group{
			Name: string(g.ID), Min: g.Min, Max: g.Max, Desired: g.Min, Zones: []string{zone}, Tags: tags,
			LaunchTemplate: "lt-" + string(g.ID), Version: "$Default", Capacity: -1,
		})
	}
}

// Snapshot tells what there is, in the words of a backend.
func (a *amazon) Snapshot(context.Context) (model.Snapshot, error) {
	out := model.Snapshot{Groups: map[model.GroupID]model.GroupSnapshot{}}
	states := map[string]model.InstanceState{
		"pending": model.InstancePending, "running": model.InstanceRunning, "stopping": model.InstanceStopping,
		"stopped": model.InstanceStopped, "shutting-down": model.InstanceTerminating,
	}
	for _, name := range a.Groups() {
		g, _ := a.Group(name)
		s := model.GroupSnapshot{TakenAt: time.Now(), Desired: g.Desired}
		for _, i := range a.Instances(name) {
			state := states[i.State]
			if state == "" {
				continue
			}
			if strings.HasSuffix(i.Lifecycle, "Standby") && (state == model.InstancePending || state == model.InstanceRunning) {
				s.Desired++
			}
			s.Instances = append(s.Instances, model.Instance{ID: model.InstanceID("aws:///" + i.Zone + "/" + i.ID), State: state})
		}
		if g.Desired > len(s.Instances) && g.Refusal != "" {
			s.Failure = &model.LaunchFailure{Class: model.FailureCapacity, Message: g.Refusal}
		}
		out.Groups[model.GroupID(name)] = s
	}
	return out, nil
}

func (a *amazon) SetFaults(_ context.Context, group model.GroupID, faults kwok.Faults) error {
	a.mu.Lock()
	a.deadBoot[group] = faults.NeverBoot
	a.mu.Unlock()
	a.Edit(string(group), func(g *awsfake.Group) {
		g.Capacity, g.Refusal = -1, ""
		if faults.CapacityAbove != nil {
			g.Capacity, g.Refusal = *faults.CapacityAbove, "We currently do not have sufficient capacity in the Availability Zone you requested."
		}
	})
	return nil
}

func (a *amazon) KillInstance(_ context.Context, id model.InstanceID) error {
	a.Terminate(string(id[strings.LastIndexByte(string(id), '/')+1:]))
	return nil
}

// translate makes of a config for the embedded backend one for this cloud, and
// has it take over the delays.
func (a *amazon) translate(text string) (string, error) {
	cfg, err := config.Parse([]byte("apiVersion: hearth.dev/v1alpha1\nkind: ProviderConfig\n"+text), "e2e")
	if err != nil {
		return "", err
	}
	if cfg.Backend.Kwok == nil {
		return "", errors.New("want the embedded backend")
	}
	a.SetTiming(awsfake.Timing{
		Boot: cfg.Backend.Kwok.BootDelay, Start: cfg.Backend.Kwok.ResumeDelay, Stop: 2 * time.Second, Terminate: 3 * time.Second,
		Standby: time.Second, Retry: 20 * time.Second, Health: 10 * time.Second,
	})
	a.SetGroups(cfg.NodeGroups())
	var file map[string]any
	if err := yaml.Unmarshal([]byte(text), &file); err != nil {
		return "", err
	}
	file["backend"] = map[string]any{"aws": map[string]any{"region": "us-east-1", "endpoint": a.server.URL, "autoDiscoveryTags": []string{}}}
	var named []any
	for _, g := range cfg.NodeGroups() {
		named = append(named, map[string]any{"id": string(g.ID), "annotations": g.Annotations})
	}
	file["nodeGroups"] = named
	out, err := yaml.Marshal(file)
	return string(out), err
}
