package dagger

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// readEvery is the time between two rounds: three readings that settle that an
// engine is idle take a minute. roundWithin bounds one.
const (
	readEvery   = 20 * time.Second
	roundWithin = 18 * time.Second
)

// Watcher reads the engines of a cluster round after round and tells what their
// readings come to. It learns of pods and nodes from whoever watches them; its
// methods are safe for concurrent use.
type Watcher struct {
	port    uint16
	scraper *Scraper
	told    func(model.EngineUse)
	every   time.Duration
	log     *slog.Logger

	mu      sync.Mutex
	pods    map[string]model.Pod // engines, by UID
	grouped map[model.NodeName]string
	renewed map[model.NodeName]bool // nodes that are gone, or another by that name
}

// NewWatcher returns a Watcher of engines that serve their metrics on port. told
// is called from Run alone, once a round for every engine.
func NewWatcher(port uint16, told func(model.EngineUse), log *slog.Logger) (*Watcher, error) {
	scraper, err := NewScraper(ReadTimeout, ReadParallel, time.Now)
	if err != nil {
		return nil, err
	}
	return &Watcher{
		port: port, scraper: scraper, told: told, every: readEvery, log: log,
		pods: map[string]model.Pod{}, grouped: map[model.NodeName]string{}, renewed: map[model.NodeName]bool{},
	}, nil
}

// PodChanged notes the present state of a pod.
func (w *Watcher) PodChanged(p model.Pod) {
	if p.Kind != model.PodEngine {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pods[p.UID] = p
}

// PodGone notes that a pod was deleted.
func (w *Watcher) PodGone(p model.Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.pods, p.UID)
}

// NodeChanged notes the present state of a Node. Engines on nodes of no group
// are not read.
func (w *Watcher) NodeChanged(n model.Node) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if before, known := w.grouped[n.Name]; known && before != n.UID {
		w.renewed[n.Name] = true
	}
	if n.Labels[model.Prefix+"/node-group"] == "" {
		delete(w.grouped, n.Name)
		return
	}
	w.grouped[n.Name] = n.UID
}

// NodeGone notes that a Node was deleted.
func (w *Watcher) NodeGone(n model.Node) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.grouped, n.Name)
	w.renewed[n.Name] = true
}

// Run reads until ctx ends.
func (w *Watcher) Run(ctx context.Context) {
	defer w.scraper.Close()
	tracker, strays := NewTracker(), map[string]bool{}
	ticker := time.NewTicker(w.every)
	defer ticker.Stop()
	for {
		w.round(ctx, tracker, strays)
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// round reads every engine once.
func (w *Watcher) round(ctx context.Context, tracker *Tracker, strays map[string]bool) {
	found := w.discover(tracker)
	for _, p := range found.Stray {
		if !strays[p.UID] {
			strays[p.UID] = true
			w.log.Info("an engine on a node of no node group is left alone", "pod", podName(p), "node", p.Node)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, roundWithin)
	defer cancel()
	take := func(r model.EngineReading) {
		change := tracker.Observe(r)
		if change.OldVersion != "" {
			w.log.Info("an engine has another version", "node", r.Node, "before", change.OldVersion, "now", r.Version)
		}
		w.told(use(tracker.State(r.Node, r.At), r, change.Lost))
	}
	for _, r := range found.Unknown {
		take(r)
	}
	w.scraper.Read(ctx, found.Targets, take)
}

func (w *Watcher) discover(tracker *Tracker) Found {
	w.mu.Lock()
	defer w.mu.Unlock()
	for node := range w.renewed {
		tracker.Forget(node)
	}
	clear(w.renewed)
	pods := make([]model.Pod, 0, len(w.pods))
	for _, p := range w.pods {
		pods = append(pods, p)
	}
	return Discover(pods, func(n model.NodeName) bool { return w.grouped[n] != "" }, w.port, time.Now())
}

// use is what is told of an engine after a reading. A clean stop rests on it, so
// one that is idle is so as of the last readings that settled it.
func use(s State, r model.EngineReading, lost bool) model.EngineUse {
	u := model.EngineUse{Node: r.Node, Pod: r.Pod, At: r.At, Wiped: lost}
	switch s.Activity {
	case Busy:
		u.Activity = model.ActivityBusy
	case Idle:
		u.Activity, u.At = model.ActivityIdle, s.QuietAt
	case Unknown:
	}
	if r.Unknown == "" {
		u.Clients, u.CacheBytes = r.Clients, max(s.CacheBytes, 0)
	}
	return u
}
