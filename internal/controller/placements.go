package controller

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/hearth-ci/hearth/internal/explain"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

const (
	// endedFor is how long a pod that was deleted can be asked about, mostEnded
	// how many of them at most.
	endedFor  = time.Hour
	mostEnded = 2000
)

// placements is what people may ask about where jobs went: what there was to
// choose from when each was bound.
type placements struct {
	of    map[string]*explain.Placement // by UID, of the pods that exist
	ended []explain.Pod                 // that were deleted, the oldest first
}

// Pod says where a runner pod went, or waits to go, and why not elsewhere; nil
// when no such pod is known. It asks the owner of the fleet; the error says that
// there is none. It is safe for concurrent use.
func (c *Controller) Pod(ctx context.Context, namespace, name string) (pod *explain.Pod, err error) {
	err = c.submit(ctx, "", func(o *owner, _ context.Context) error {
		pod = o.explainPod(namespace, name, time.Now())
		return nil
	})
	if err != nil {
		return nil, err // pod may still be written
	}
	return pod, nil
}

// placed takes in that a pod is seen bound for the first time, or was deleted,
// before its job counts for anything.
func (o *owner) placed(before, p model.Pod, gone bool, now time.Time) {
	switch {
	case gone:
		if before.UID != "" {
			ended := o.explained(before, now)
			ended.State = explain.PodEnded
			o.placements.ended = append(o.placements.ended, ended)
		}
		delete(o.placements.of, p.UID)
	case o.started && before.Node == "" && p.Node != "":
		o.placements.of[p.UID] = o.placement(p, now)
	}
	old := 0
	for ; old < len(o.placements.ended); old++ {
		if len(o.placements.ended)-old <= mostEnded && now.Sub(o.placements.ended[old].At) < endedFor {
			break
		}
	}
	o.placements.ended = slices.Delete(o.placements.ended, 0, old)
}

// explainPod finds the newest pod of that name.
func (o *owner) explainPod(namespace, name string, now time.Time) *explain.Pod {
	var newest model.Pod
	for _, p := range o.history.pods {
		if p.Namespace == namespace && p.Name == name && !p.Created.Before(newest.Created) {
			newest = p.Pod
		}
	}
	if newest.UID != "" {
		d := o.explained(newest, now)
		return &d
	}
	for _, d := range slices.Backward(o.placements.ended) {
		if d.Namespace == namespace && d.Name == name {
			d.At = now
			return &d
		}
	}
	return nil
}

func (o *owner) explained(p model.Pod, now time.Time) explain.Pod {
	d := explain.Pod{
		At: now, Namespace: p.Namespace, Name: p.Name, State: explain.PodWaiting, Key: string(p.Key), Job: string(p.Job),
		Asked: string(p.Group), Hint: p.Placement, Created: p.Created, Node: string(p.Node), Placement: o.placements.of[p.UID],
	}
	switch {
	case !p.Finished.IsZero():
		d.State = explain.PodEnded
	case p.Node != "":
		d.State = explain.PodRunning
	default:
		d.Placement = o.placement(p, now)
	}
	d.Group = string(o.groupOf[o.names[p.Node]])
	return d
}

// placement is what a pod can choose from now: the nodes that are warm for its
// key.
func (o *owner) placement(p model.Pod, now time.Time) *explain.Placement {
	c := &explain.Placement{At: now}
	if p.Key == "" {
		return c
	}
	key, own := scoring.KeyOf(p.Key), o.names[p.Node]
	for id := range o.history.holders[key] {
		w := scoring.Node{Uses: o.history.uses[id]}.WarmthFor(key, now)
		if w == 0 {
			continue
		}
		if id == own && p.Node != "" {
			c.Warmth = w
			continue
		}
		group := o.groupOf[id]
		g := o.fleet[group]
		if g == nil || !g.Has(id) {
			continue
		}
		c.Warm++
		c.Others = append(c.Others, explain.Other{
			Name: string(g.Node(id).Name), Instance: string(id), Group: string(group), Warmth: w, Why: o.whyNot(p, id),
		})
	}
	slices.SortFunc(c.Others, func(a, b explain.Other) int {
		return cmp.Or(cmp.Compare(b.Warmth, a.Warmth), cmp.Compare(a.Instance, b.Instance))
	})
	c.Others = slices.Clip(c.Others[:min(len(c.Others), explain.MaxOthers)])
	return c
}

// whyNot says why a warm node does not get a pod.
func (o *owner) whyNot(p model.Pod, id model.InstanceID) explain.Reason {
	group := o.groupOf[id]
	g := o.fleet[group]
	n := g.Status(id)
	if p.Group != "" && p.Group != group {
		return explain.Reason{Code: "other-group", Text: fmt.Sprintf("it is of node group %s, the pod asks for %s", group, p.Group)}
	}
	switch stateOf(n) {
	case explain.StateParked:
		return explain.Reason{Code: "parked", Text: "it is parked, and takes pods only once it was resumed"}
	case explain.StateLeaving:
		return explain.Reason{Code: "leaving", Text: "it was given up: no new pods start on it"}
	case explain.StateStarting:
		return explain.Reason{Code: "starting", Text: "it is on its way"}
	case explain.StateNotReady:
		return explain.Reason{Code: "not-ready", Text: "its Node is not Ready"}
	case explain.StateBusy, explain.StateIdle:
	}
	if n.Node.Unschedulable || !n.Node.CATaintSince.IsZero() {
		return explain.Reason{Code: "cordoned", Text: "it is cordoned, or cluster-autoscaler is about to remove it"}
	}
	jobs, slots := o.history.perNode[n.Node.Name], g.Settings().JobsPerNode
	if jobs >= slots {
		return explain.Reason{Code: "full", Text: fmt.Sprintf("full: it runs %d of %d jobs", jobs, slots)}
	}
	return explain.Reason{Code: "room", Text: fmt.Sprintf("room (%d of %d jobs): the scheduler gave it fewer points or filtered it", jobs, slots)}
}
