package kube

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/pkg/model"
)

// Sink is told what happens in the cluster. Its methods are called one at a
// time, and for one object in the order in which the API server made the
// changes; states in between may be left out. They must return soon and must
// not call the feed.
type Sink interface {
	// NodeChanged tells of every Node that has a providerID, at first and
	// whenever something of it changed.
	NodeChanged(model.Node)
	// NodeGone tells the last that was known of a Node that was deleted.
	NodeGone(model.Node)
	// PodChanged tells of every pod that is bound to a node or waits for one,
	// but for those that are to be ignored.
	PodChanged(model.Pod)
	// PodGone tells the last that was known of a pod that was deleted.
	PodGone(model.Pod)
	// RunnerComing tells when a runner was created that asks for the group by name
	// and has no pod yet; zero: it has one, or is gone.
	RunnerComing(group model.GroupID, runner string, since time.Time)
	// AnnotationsChanged tells the annotations with Hearth's prefix that
	// people put on the group's object; none when the object is gone.
	AnnotationsChanged(model.GroupID, map[string]string)
}

// FeedConfig says what a Feed needs. All fields are required.
type FeedConfig struct {
	Client client.WithWatch
	Sink   Sink
	// Engines selects the pods that are Dagger engines.
	Engines EngineSelector
	// KeysFor returns the labels or annotations that make the cache key in a
	// group, none for the default; the group is empty when it is not known.
	// It is asked whenever a pod changes, and under the same terms as Sink.
	KeysFor func(model.GroupID) []string
	Logger  *slog.Logger
}

// retryMost bounds the pause before a watch is tried again, jitter apart.
// client-go's own bound of 30 s leaves Hearth blind for up to a minute after
// the API server is back.
const retryMost = 5 * time.Second

// Feed watches the cluster and tells a Sink. It keeps only what matters of
// each object. After a broken connection it tells the difference.
type Feed struct {
	cfg    FeedConfig
	reader podReader

	mu     sync.Mutex // held while the sink is called
	nodes  *mirror[model.Node]
	pods   *mirror[model.Pod]
	groups *mirror[groupNotes]
	// nodeLabels are the values of the nodes' group label, labelled the groups
	// by the value of that label.
	nodeLabels map[model.NodeName]string
	labelled   map[string]model.GroupID
	// runners are GitHub's ephemeral runners, whose pods have their names; jobs
	// what they do, podNames the pods, by those names.
	runners  *mirror[runnerJob]
	jobs     map[types.NamespacedName]runnerJob
	podNames map[types.NamespacedName]types.UID
	// coming are the runners that were told to be without a pod, met those that
	// have or had one.
	coming, met map[types.NamespacedName]bool
}

// groupNotes is what people write about a group.
type groupNotes struct {
	id          model.GroupID
	annotations map[string]string
}

// NewFeed returns a feed that watches once it is run.
func NewFeed(cfg FeedConfig) (*Feed, error) {
	if cfg.Client == nil || cfg.Sink == nil || cfg.Engines.Labels == nil || cfg.KeysFor == nil || cfg.Logger == nil {
		return nil, errors.New("making a feed: a field of its configuration is missing")
	}
	f := &Feed{
		cfg: cfg, nodeLabels: map[model.NodeName]string{}, labelled: map[string]model.GroupID{},
		jobs: map[types.NamespacedName]runnerJob{}, podNames: map[types.NamespacedName]types.UID{},
		coming: map[types.NamespacedName]bool{}, met: map[types.NamespacedName]bool{},
	}
	f.reader = podReader{
		engines: cfg.Engines,
		groupOf: f.groupOf,
		nodeGroup: func(name model.NodeName) model.GroupID {
			return f.groupOf(f.nodeLabels[name])
		},
		keysFor: cfg.KeysFor,
	}
	f.nodes = &mirror[model.Node]{
		feed: f, items: map[types.UID]model.Node{}, synced: make(chan struct{}),
		strip: stripNode, read: readNode,
		changed: func(n model.Node) {
			f.nodeLabels[n.Name] = n.Labels[v1alpha1.NodeGroupLabel]
			cfg.Sink.NodeChanged(n)
		},
		gone: func(n model.Node) {
			delete(f.nodeLabels, n.Name)
			cfg.Sink.NodeGone(n)
		},
	}
	f.pods = &mirror[model.Pod]{
		feed: f, items: map[types.UID]model.Pod{}, synced: make(chan struct{}),
		strip: stripPodOrEngine,
		read: func(obj any) (model.Pod, bool) {
			p := f.reader.pod(obj.(*corev1.Pod))
			if p.Kind == model.PodRunner {
				f.ofRunner(&p)
			}
			return p, p.Kind != model.PodIgnored
		},
		changed: func(p model.Pod) {
			f.podNames[nameOf(p)] = types.UID(p.UID)
			f.meet(p)
			cfg.Sink.PodChanged(p)
		},
		another: func(before, now model.Pod) bool { return before.Kind != now.Kind }, // its labels were changed
		gone: func(p model.Pod) {
			if f.podNames[nameOf(p)] == types.UID(p.UID) {
				delete(f.podNames, nameOf(p))
			}
			if _, known := f.jobs[nameOf(p)]; !known {
				delete(f.met, nameOf(p))
			}
			cfg.Sink.PodGone(p)
		},
	}
	f.runners = &mirror[runnerJob]{
		feed: f, items: map[types.UID]runnerJob{}, synced: make(chan struct{}),
		strip: stripRunner, read: readRunner,
		changed: f.runnerChanged, gone: f.runnerGone,
	}
	f.groups = &mirror[groupNotes]{
		feed: f, items: map[types.UID]groupNotes{}, synced: make(chan struct{}),
		strip: stripGroup, read: readGroup,
		changed: func(g groupNotes) {
			f.labelled[v1alpha1.GroupLabel(g.id)] = g.id
			cfg.Sink.AnnotationsChanged(g.id, g.annotations)
		},
		gone: func(g groupNotes) { cfg.Sink.AnnotationsChanged(g.id, nil) },
	}
	return f, nil
}

// Run watches until ctx ends, and returns when nothing of it runs any more.
// It is called once. Pods come after the nodes and groups that say which
// annotations make their keys.
func (f *Feed) Run(ctx context.Context) {
	var running sync.WaitGroup
	defer running.Wait()
	running.Go(func() { f.follow(ctx, &corev1.Node{}, &corev1.NodeList{}, f.nodes) })
	running.Go(func() { f.follow(ctx, &v1alpha1.RunnerNodeGroup{}, &v1alpha1.RunnerNodeGroupList{}, f.groups) })
	running.Go(func() { f.followRunners(ctx) })
	for _, synced := range []<-chan struct{}{f.nodes.synced, f.groups.synced} {
		select {
		case <-synced:
		case <-ctx.Done():
			return
		}
	}
	f.follow(ctx, &corev1.Pod{}, &corev1.PodList{}, f.pods)
}

// Synced says whether the sink has been told of everything that there was when
// the feed began. It never becomes false again.
func (f *Feed) Synced() bool {
	select {
	case <-f.pods.synced:
		return true
	default:
		return false
	}
}

// Read says of a pod, which need not exist yet, what the sink would be told of
// it: of one to be ignored only the names. It is safe for concurrent use, but
// must not be called by the sink.
func (f *Feed) Read(p *corev1.Pod) model.Pod {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.reader.pod(p)
}

// follow keeps store up to date with one kind until ctx ends.
func (f *Feed) follow(ctx context.Context, kind client.Object, list client.ObjectList, store cache.ReflectorStore) {
	options := func(o metav1.ListOptions) *client.ListOptions {
		return &client.ListOptions{Raw: &o, Limit: o.Limit, Continue: o.Continue}
	}
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			page := list.DeepCopyObject().(client.ObjectList)
			return page, f.cfg.Client.List(ctx, page, options(o))
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return f.cfg.Client.Watch(ctx, list, options(o))
		},
	}
	reflector := cache.NewReflectorWithOptions(
		cache.ToListWatcherWithWatchListSemantics(lw, f.cfg.Client), kind, store,
		cache.ReflectorOptions{Name: "feed", Backoff: &wait.Backoff{
			Duration: 500 * time.Millisecond, Factor: 2, Cap: retryMost, Steps: math.MaxInt32, Jitter: 0.5,
		}},
	)
	reflector.RunWithContext(logr.NewContext(ctx, logr.FromSlogHandler(f.cfg.Logger.Handler())))
}

// groupOf returns the group with that label value. Values that are not an id
// themselves are known from the groups' objects.
func (f *Feed) groupOf(label string) model.GroupID {
	if id, ok := f.labelled[label]; ok {
		return id
	}
	return model.GroupID(label)
}

func stripNode(obj any) {
	if n, ok := obj.(*corev1.Node); ok {
		n.ManagedFields, n.Status.Images = nil, nil
	}
}

func stripPod(obj any) {
	if p, ok := obj.(*corev1.Pod); ok {
		p.ManagedFields = nil
		kept := corev1.PodSpec{
			NodeName: p.Spec.NodeName, NodeSelector: p.Spec.NodeSelector,
			TerminationGracePeriodSeconds: p.Spec.TerminationGracePeriodSeconds,
		}
		for _, c := range p.Spec.Containers {
			kept.Containers = append(kept.Containers, corev1.Container{Name: c.Name, Image: c.Image})
		}
		p.Spec = kept
	}
}

func stripGroup(obj any) {
	if g, ok := obj.(*v1alpha1.RunnerNodeGroup); ok {
		g.ManagedFields, g.Status = nil, v1alpha1.RunnerNodeGroupStatus{}
	}
}

// readNode leaves out Nodes that no cloud has claimed yet.
func readNode(obj any) (model.Node, bool) {
	n := nodeFrom(obj.(*corev1.Node))
	return n, n.ID != ""
}

func readGroup(obj any) (groupNotes, bool) {
	o := obj.(*v1alpha1.RunnerNodeGroup)
	g := groupNotes{id: groupID(o), annotations: map[string]string{}}
	for k, v := range o.Annotations {
		if strings.HasPrefix(k, model.Prefix+"/") {
			g.annotations[k] = v
		}
	}
	return g, true
}
