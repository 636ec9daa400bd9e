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

// runnerJob is what an EphemeralRunner's status tells of its job.
type runnerJob struct {
	name types.NamespacedName
	key  model.CacheKey
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

// jobPickedUp tells of the pod anew, if it is known.
func (f *Feed) jobPickedUp(r runnerJob) {
	f.jobs[r.name] = r.key
	uid := f.podNames[r.name]
	p, known := f.pods.items[uid]
	if !known || p.Kind != model.PodRunner || p.Job == r.key {
		return
	}
	p.Job = r.key
	f.pods.items[uid] = p
	f.cfg.Sink.PodChanged(p)
}

func stripRunner(obj any) {
	if o, ok := obj.(*unstructured.Unstructured); ok {
		o.SetManagedFields(nil)
		unstructured.RemoveNestedField(o.Object, "spec")
	}
}

// readRunner leaves out runners that have no job yet.
func readRunner(obj any) (runnerJob, bool) {
	o := obj.(*unstructured.Unstructured)
	text := func(field string) string {
		value, _, _ := unstructured.NestedString(o.Object, "status", field) // of another type: nothing
		return strings.TrimSpace(value)
	}
	key := jobKey(text("jobRepositoryName"), text("jobWorkflowRef"))
	return runnerJob{types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetName()}, key}, key != ""
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
