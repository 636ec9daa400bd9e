package kube

import (
	"context"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/pkg/model"
)

// lookForRunners is how often it is looked whether the cluster has learnt of
// EphemeralRunners.
const lookForRunners = time.Minute

// ephemeralRunner is a runner of GitHub's actions-runner-controller. Its pod
// bears the same name; its status says which job it has picked up.
func ephemeralRunner(kind string) schema.GroupVersionKind {
	return schema.GroupVersionKind{Group: "actions.github.com", Version: "v1alpha1", Kind: kind}
}

// runnerJob is what an EphemeralRunner tells of its job and of its pod.
type runnerJob struct {
	name types.NamespacedName
	key  model.CacheKey // empty when it does not say
	busy bool           // it has a job
	// group is the value of the node group's label that its pod will ask for,
	// empty when it asks for none.
	group   string
	created time.Time
	ended   bool
}

func nameOf(p model.Pod) types.NamespacedName {
	return types.NamespacedName{Namespace: p.Namespace, Name: p.Name}
}

// followRunners watches EphemeralRunners, once the cluster has them. Nothing
// waits for it: without them pods have the key of their scale set.
func (f *Feed) followRunners(ctx context.Context) {
	list := &unstructured.UnstructuredList{}
	list.SetGroupVersionKind(ephemeralRunner("EphemeralRunnerList"))
	said := false
	for {
		err := f.cfg.Client.List(ctx, list.DeepCopyObject().(client.ObjectList), client.Limit(1))
		if err == nil {
			break
		}
		if !meta.IsNoMatchError(err) && ctx.Err() == nil && !said {
			said = true
			f.cfg.Logger.Warn("EphemeralRunners cannot be listed: jobs count by their scale set", "err", err)
		}
		timer := time.NewTimer(lookForRunners)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
	kind := &unstructured.Unstructured{}
	kind.SetGroupVersionKind(ephemeralRunner("EphemeralRunner"))
	f.follow(ctx, kind, list, f.runners)
}

// runnerChanged tells of the pod anew, if it is known: it has picked up a job,
// or is known to have none yet.
func (f *Feed) runnerChanged(r runnerJob) {
	f.jobs[r.name] = r
	f.tellComing(r)
	uid := f.podNames[r.name]
	p, known := f.pods.items[uid]
	if !known || p.Kind != model.PodRunner {
		return
	}
	before := p
	if f.ofRunner(&p); p.Job == before.Job && p.Waiting == before.Waiting {
		return
	}
	f.pods.items[uid] = p
	f.cfg.Sink.PodChanged(p)
}

func (f *Feed) runnerGone(r runnerJob) {
	delete(f.jobs, r.name)
	r.ended = true
	f.tellComing(r)
	delete(f.met, r.name)
}

// meet notes that a pod is there: its runner's is not to come any more.
func (f *Feed) meet(p model.Pod) {
	if r, known := f.jobs[nameOf(p)]; known || p.Kind == model.PodRunner {
		f.met[nameOf(p)] = true
		f.tellComing(r)
	}
}

// tellComing tells whether a runner that asks for a group has no pod yet. A runner
// is there seconds before its pod: it is registered with GitHub first. The sets of
// runners would say so hardly earlier, and say wrongly that runners are missing from
// when one ends until the set is scaled down.
func (f *Feed) tellComing(r runnerJob) {
	coming := r.group != "" && !r.ended && !r.busy && !f.met[r.name]
	switch {
	case coming == f.coming[r.name]:
	case coming:
		f.coming[r.name] = true
		f.cfg.Sink.RunnerComing(f.groupOf(r.group), r.name.String(), r.created)
	default:
		delete(f.coming, r.name)
		f.cfg.Sink.RunnerComing(f.groupOf(r.group), r.name.String(), time.Time{})
	}
}

// ofRunner fills in what the EphemeralRunner of a pod tells.
func (f *Feed) ofRunner(p *model.Pod) {
	r, known := f.jobs[nameOf(*p)]
	p.Job, p.Waiting = r.key, known && !r.busy && p.Finished.IsZero()
}

func stripRunner(obj any) {
	if o, ok := obj.(*unstructured.Unstructured); ok {
		o.SetManagedFields(nil)
		group := askedGroup(o)
		unstructured.RemoveNestedField(o.Object, "spec")
		if group != "" {
			_ = unstructured.SetNestedField(o.Object, group, podSelector()...)
		}
	}
}

// podSelector is where an EphemeralRunner says on which node group its pod is
// to run: its spec has a pod template's in it.
func podSelector() []string { return []string{"spec", "spec", "nodeSelector", v1alpha1.NodeGroupLabel} }

func askedGroup(o *unstructured.Unstructured) string {
	group, _, _ := unstructured.NestedString(o.Object, podSelector()...) // of another type: none
	return group
}

// readRunner reads what a runner does. Which of the fields that tell of its job
// there are depends on the controller's version.
func readRunner(obj any) (runnerJob, bool) {
	o := obj.(*unstructured.Unstructured)
	status, _, _ := unstructured.NestedMap(o.Object, "status")
	busy := false
	for _, field := range []string{"jobId", "jobRequestId", "jobRepositoryName", "jobDisplayName", "jobWorkflowRef", "workflowRunId"} {
		switch value := status[field].(type) {
		case nil:
		case string:
			busy = busy || value != ""
		case int64:
			busy = busy || value != 0
		case float64:
			busy = busy || value != 0
		}
	}
	text := func(field string) string {
		value, _, _ := unstructured.NestedString(o.Object, "status", field) // of another type: nothing
		return strings.TrimSpace(value)
	}
	key := jobKey(text("jobRepositoryName"), text("jobWorkflowRef"))
	phase := text("phase")
	return runnerJob{
		name: types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetName()}, key: key, busy: busy,
		group: askedGroup(o), created: o.GetCreationTimestamp().Time,
		ended: o.GetDeletionTimestamp() != nil || phase == "Succeeded" || phase == "Failed",
	}, true
}

// jobKey names the pipeline of a GitHub job: its repository and its workflow,
// whatever the branch, as in "github/acme/shop/.github/workflows/ci.yml". A
// workflow that another repository lends keeps that one's name in it. The
// repository is "owner/name", the reference "owner/name/path@ref".
func jobKey(repository, workflowRef string) model.CacheKey {
	if repository == "" {
		return ""
	}
	workflow, _, _ := strings.Cut(workflowRef, "@")
	workflow = strings.TrimPrefix(workflow, repository+"/")
	return bounded(strings.TrimSuffix("github/"+repository+"/"+workflow, "/"))
}
