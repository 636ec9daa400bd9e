package kube

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Examine looks for what in a cluster gets in Hearth's way or costs caches: the
// flags of cluster-autoscaler, engines that cannot be known or stopped, runner
// pods that may be evicted. Each line says what to change. It reads all pods
// once, page by page, and changes nothing. watches says that Hearth is to watch
// beside another provider.
func Examine(ctx context.Context, c client.Client, engines EngineSelector, watches bool) (advice []string, err error) {
	e := examination{reader: podReader{
		engines: engines, groupOf: func(label string) model.GroupID { return model.GroupID(label) },
		nodeGroup: func(model.NodeName) model.GroupID { return "" }, keysFor: func(model.GroupID) []string { return nil },
	}, watches: watches, engineOn: map[string]bool{}, served: map[string]bool{}}
	list := &corev1.PodList{}
	for {
		if err := c.List(ctx, list, client.Limit(500), client.Continue(list.Continue)); err != nil {
			return nil, fmt.Errorf("listing pods: %w", err)
		}
		for i := range list.Items {
			e.pod(&list.Items[i])
		}
		if list.Continue == "" {
			return e.advice(), nil
		}
	}
}

type examination struct {
	reader                              podReader
	watches                             bool
	autoscalers                         []string
	served                              map[string]bool // deployments of cluster-autoscaler that use Hearth
	engines                             int
	engineOn                            map[string]bool // nodes with an engine
	silent, short, tolerant, evictables sightings
	double                              sightings
}

// sightings are pods of which the same is to be said.
type sightings struct {
	n     int
	first string
}

func (s *sightings) add(p *corev1.Pod) {
	if s.n++; s.n == 1 {
		s.first = p.Namespace + "/" + p.Name
	}
}

func (e *examination) pod(p *corev1.Pod) {
	if p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return
	}
	for _, c := range p.Spec.Containers {
		if flags := autoscalerFlags(c); flags != nil {
			if flags["cloud-provider"] == "externalgrpc" {
				e.served[p.Namespace+"/"+ownerOf(p)] = true
			}
			for _, text := range unfit(flags, e.watches) {
				e.autoscalers = append(e.autoscalers, fmt.Sprintf("cluster-autoscaler (pod %s/%s): %s", p.Namespace, p.Name, text))
			}
		}
	}
	switch seen := e.reader.pod(p); seen.Kind {
	case model.PodEngine:
		e.engines++
		if !seen.Engine.Metrics {
			e.silent.add(p)
		}
		if seen.Engine.Grace < usualGrace {
			e.short.add(p)
		}
		if seen.EngineState.ToleratesDrain {
			e.tolerant.add(p)
		}
		if p.DeletionTimestamp != nil { // another takes its place
			break
		}
		if e.engineOn[p.Spec.NodeName] {
			e.double.add(p)
		}
		e.engineOn[p.Spec.NodeName] = p.Spec.NodeName != ""
	case model.PodRunner:
		if seen.Key != "" && p.Annotations[annotationSafeToEvict] != "false" {
			e.evictables.add(p)
		}
	case model.PodIgnored:
	}
}

const (
	// usualGrace is what Dagger's chart gives an engine to stop.
	usualGrace            = 300 * time.Second
	annotationSafeToEvict = "cluster-autoscaler.kubernetes.io/safe-to-evict"
)

func (e *examination) advice() (advice []string) {
	advice = e.autoscalers
	if len(e.served) > 1 {
		advice = append(advice, fmt.Sprintf("%d cluster-autoscalers use it, %s: each orders nodes for the same pods, keep one",
			len(e.served), strings.Join(slices.Sorted(maps.Keys(e.served)), " and ")))
	}
	if e.engines == 0 {
		advice = append(advice, "no pod is an engine's by engines.podSelector and engines.namespaces: nodes would be ended with their engines running")
	}
	for _, s := range []struct {
		sightings
		text string
	}{
		{e.silent, "say nothing of what they do: set " + envMetrics + ", else only runner pods tell whether they are idle"},
		{e.short, fmt.Sprintf("have less than %d s to stop: raise terminationGracePeriodSeconds, else one that needs longer loses its cache", int(usualGrace.Seconds()))},
		{e.double, "are not the only one on their node, and jobs find only one's cache: check which DaemonSets run engines there"},
		{e.tolerant, "tolerate every taint, so that their nodes are never parked: have them tolerate only those that the nodes have, by key"},
	} {
		if s.n > 0 {
			advice = append(advice, fmt.Sprintf("%d of %d engines, such as %s, %s", s.n, e.engines, s.first, s.text))
		}
	}
	if e.evictables.n > 0 {
		advice = append(advice, fmt.Sprintf("%d runner pods, such as %s, may be evicted while their job runs: have them bear the annotation %s: \"false\", "+
			"or the placement webhook add it", e.evictables.n, e.evictables.first, annotationSafeToEvict))
	}
	return advice
}

// ownerOf is who makes pods like this one, else the pod.
func ownerOf(p *corev1.Pod) string {
	for _, o := range p.OwnerReferences {
		return o.Name
	}
	return p.Name
}

// autoscalerFlags returns the flags of cluster-autoscaler, nil when the
// container is not one. Both "--flag=value" and "--flag value" are read.
func autoscalerFlags(c corev1.Container) map[string]string {
	words := slices.Concat(c.Command, c.Args)
	if !strings.Contains(c.Image+" "+strings.Join(c.Command, " "), "cluster-autoscaler") {
		return nil
	}
	flags := map[string]string{}
	for i, word := range words {
		name, isFlag := strings.CutPrefix(word, "-")
		if !isFlag {
			continue
		}
		name, value, has := strings.Cut(strings.TrimPrefix(name, "-"), "=")
		if !has && i+1 < len(words) && !strings.HasPrefix(words[i+1], "-") {
			value = words[i+1]
		}
		flags[name] = value
	}
	return flags
}

// unfit says which flags do not go with Hearth.
func unfit(flags map[string]string, watches bool) (advice []string) {
	provider := flags["cloud-provider"]
	if provider != "externalgrpc" {
		if watches {
			return nil
		}
		return []string{fmt.Sprintf("--cloud-provider is %q, want externalgrpc", provider)}
	}
	if watches {
		return []string{"it uses Hearth, which only watches: set backend.aws.dryRun to false"}
	}
	if !slices.Contains(strings.Split(flags["expander"], ","), "grpc") || flags["grpc-expander-url"] == "" {
		advice = append(advice, "want --expander=grpc,least-waste and --grpc-expander-url: else the group with warm parked nodes is not preferred")
	}
	for _, want := range []struct{ flag, value, why string }{
		{"daemonset-eviction-for-occupied-nodes", "false", "else engines are evicted before Hearth is asked"},
		{"skip-nodes-with-local-storage", "false", "else nodes with engines never go"},
		{"skip-nodes-with-system-pods", "false", "else nodes with pods of kube-system never go"},
	} {
		if flags[want.flag] != want.value {
			advice = append(advice, fmt.Sprintf("want --%s=%s: %s", want.flag, want.value, want.why))
		}
	}
	for _, want := range []struct {
		flag string
		most time.Duration
		why  string
	}{
		{"scale-down-delay-after-add", time.Minute, "else scale-down hardly ever runs in a busy cluster"},
		{"scale-down-unneeded-time", time.Minute, "the policy has waited already when it releases a node"},
	} {
		if d, err := time.ParseDuration(flags[want.flag]); err != nil || d > want.most {
			advice = append(advice, fmt.Sprintf("want --%s of %s at most: %s", want.flag, want.most, want.why))
		}
	}
	return advice
}
