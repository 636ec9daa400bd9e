package demo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// summary checks every claim against the cluster, prints the table, and
// returns the last line.
func (s *story) summary(ctx context.Context) (string, error) {
	nodes, err := s.ground.Kube.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: nodeGroupLabel})
	if err != nil {
		return "", fmt.Errorf("counting the nodes that were kept: %w", err)
	}
	kept := map[string]bool{}
	for _, n := range nodes.Items {
		kept[n.Name] = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = time.Now()
	s.table(kept)
	problems := s.check(kept)
	if len(problems) > 0 {
		return "", errors.Join(append([]error{ErrClaims}, problems...)...)
	}
	removed := len(s.nodes) - len(kept)
	return fmt.Sprintf("demo ok: %d jobs ran, %d nodes launched, %d kept warm, %d removed", len(s.jobs), len(s.nodes), len(kept), removed), nil
}

func (s *story) sorted() []*nodeStory {
	return slices.SortedFunc(maps.Values(s.nodes), func(a, b *nodeStory) int {
		return strings.Compare(a.Spec.NodeGroup+a.Status.NodeName, b.Spec.NodeGroup+b.Status.NodeName)
	})
}

func (s *story) table(kept map[string]bool) {
	w := tabwriter.NewWriter(s.cfg.Out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nNODE GROUP\tNODE\tJOBS\tWARM FOR\tEND")
	for _, n := range s.sorted() {
		end := "removed"
		if kept[n.Status.NodeName] {
			end = "kept warm"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", n.Spec.NodeGroup, n.Status.NodeName, strings.Join(n.jobs, ", "), n.repositories(), end)
	}
	fmt.Fprintln(w)
	_ = w.Flush()
}

// check returns what did not happen of what the summary says.
func (s *story) check(kept map[string]bool) (problems []error) {
	claim := func(ok bool, format string, args ...any) {
		if !ok {
			problems = append(problems, fmt.Errorf(format, args...))
		}
	}
	for name, job := range s.jobs {
		claim(job.done && job.node != "", "job %s did not run", name)
	}
	left := map[string]int{}
	for _, n := range s.nodes {
		group := n.Spec.NodeGroup
		claim(kept[n.Status.NodeName] != n.gone, "node %s: gone is %v by its RunnerNode, and the cluster says otherwise", n.Status.NodeName, n.gone)
		if n.gone {
			continue
		}
		left[group]++
		for _, other := range s.nodes {
			if other.gone && other.Spec.NodeGroup == group {
				claim(other.repositories() == 0 || n.repositories() > 0, "node %s, warm for %d repositories, went and the cold %s stayed",
					other.Status.NodeName, other.repositories(), n.Status.NodeName)
			}
		}
	}
	for group, want := range minWarm() {
		claim(left[group] == want, "%s keeps %d nodes, min-warm is %d", group, left[group], want)
	}
	claim(len(s.nodes) > len(kept), "no node was removed")
	return problems
}

// repositories is how many the node's engine is warm for, by the jobs that were
// seen to run on it rather than by what the provider says.
func (n *nodeStory) repositories() int {
	return len(slices.Compact(slices.Sorted(slices.Values(n.jobs))))
}
