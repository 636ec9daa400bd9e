package config

import (
	"fmt"
	"maps"
	"math"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/hearth-ci/hearth/pkg/model"
)

// The labels that Hearth gives every node of its groups itself.
const (
	nodeGroupLabel = model.Prefix + "/node-group"
	hostnameLabel  = "kubernetes.io/hostname"
	// warmLabelPrefix starts the labels of keys that a node is warm for. A new
	// node is warm for none: cluster-autoscaler must not be promised one.
	warmLabelPrefix = "cache." + model.Prefix + "/"
)

// What is wanted in fields that cannot be left out.
const (
	wantBackend  = "exactly one of kwok, aws"
	wantID       = "a lower-case DNS name of at most 63 characters"
	wantMax      = "a whole number from 0 to 100000"
	wantTaintKey = "a taint key such as example.com/ci"
	wantEffect   = "NoSchedule, PreferNoSchedule or NoExecute"
)

// root reads the whole file into c, which holds the defaults.
func (d *decoder) root(c *Config, n *yaml.Node) {
	read := group
	if at := valueOf(valueOf(n, "backend"), "aws"); at != nil {
		read = scalingGroup
	}
	object(fields{
		"apiVersion":     exactly(APIVersion),
		"kind":           exactly(Kind),
		"server":         server(&c.Server),
		"http":           object(fields{"address": address(&c.HTTP.Address)}, nil),
		"log":            object(fields{"level": level(&c.Log.Level)}, nil),
		"kubernetes":     object(fields{"kubeconfig": anyText(&c.Kubernetes.Kubeconfig)}, nil),
		"leaderElection": election(&c.LeaderElection),
		"backend":        backend(&c.Backend),
		"nodeGroups":     list(MaxGroups, func() reader { return read(&c.groups) }),
		"engines":        engines(&c.Engines),
		"placement":      placement(&c.Placement),
		"ci":             ci(&c.CI),
	}, required{"apiVersion": strconv.Quote(APIVersion), "kind": strconv.Quote(Kind), "backend": wantBackend})(d, "", n)
	d.uniqueAddresses(c)
	d.uniqueGroups(c.groups)
	if len(c.groups) == 0 && c.Backend.AWS == nil {
		d.warn("nodeGroups", "there are no node groups: nothing will be scaled")
	}
}

// valueOf returns the value of a key of a mapping, nil when there is none.
func valueOf(n *yaml.Node, key string) *yaml.Node {
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}

func server(s *Server) reader {
	read := object(fields{
		"address":         address(&s.Address),
		"expanderAddress": address(&s.ExpanderAddress),
		"tls": object(fields{
			"certFile":     anyText(&s.TLS.CertFile),
			"keyFile":      anyText(&s.TLS.KeyFile),
			"clientCAFile": anyText(&s.TLS.ClientCAFile),
		}, nil),
	}, nil)
	return func(d *decoder, at string, n *yaml.Node) {
		read(d, at, n)
		files := []string{s.TLS.CertFile, s.TLS.KeyFile, s.TLS.ClientCAFile}
		if slices.Contains(files, "") && slices.ContainsFunc(files, func(f string) bool { return f != "" }) {
			d.problem(join(at, "tls"), "want all of certFile, keyFile, clientCAFile or none of them")
		}
	}
}

func level(into *string) reader {
	return text(into, "debug, info, warn or error", func(s string) bool {
		return slices.Contains([]string{"debug", "info", "warn", "error"}, s)
	})
}

func address(into *string) reader {
	return text(into, `an address such as ":8086" or "127.0.0.1:8086"`, func(s string) bool {
		_, port, err := net.SplitHostPort(s)
		if err != nil {
			return false
		}
		_, err = strconv.ParseUint(port, 10, 16)
		return err == nil
	})
}

func (d *decoder) uniqueAddresses(c *Config) {
	taken := map[string]string{}
	type listener struct{ field, address string }
	listeners := []listener{
		{"server.address", c.Server.Address},
		{"server.expanderAddress", c.Server.ExpanderAddress},
		{"http.address", c.HTTP.Address},
	}
	if c.Placement != nil {
		listeners = append(listeners, listener{"placement.address", c.Placement.Address})
	}
	for _, a := range listeners {
		if _, port, _ := net.SplitHostPort(a.address); port == "0" {
			continue // any free port, another one each time
		}
		if other, ok := taken[a.address]; ok {
			d.problem(a.field, fmt.Sprintf("want an address of its own, got that of %s (%s)", other, a.address))
		}
		taken[a.address] = a.field
	}
}

func election(l *LeaderElection) reader {
	read := object(fields{
		"enabled":       boolean(&l.Enabled),
		"namespace":     text(&l.Namespace, "the name of a namespace", func(s string) bool { return len(validation.IsDNS1123Label(s)) == 0 }),
		"leaseDuration": span(&l.LeaseDuration, time.Second),
		"renewDeadline": span(&l.RenewDeadline, time.Second),
		"retryPeriod":   span(&l.RetryPeriod, 100*time.Millisecond),
	}, nil)
	return func(d *decoder, at string, n *yaml.Node) {
		read(d, at, n)
		if l.LeaseDuration <= l.RenewDeadline {
			d.refuse(join(at, "leaseDuration"), fmt.Sprintf("more than renewDeadline (%s)", l.RenewDeadline), l.LeaseDuration.String())
		}
		// client-go waits up to 1.2 retry periods between two attempts.
		if l.RenewDeadline <= l.RetryPeriod*6/5 {
			d.refuse(join(at, "renewDeadline"), fmt.Sprintf("more than 1.2 × retryPeriod (%s)", l.RetryPeriod), l.RenewDeadline.String())
		}
	}
}

func backend(b *Backend) reader {
	return func(d *decoder, at string, n *yaml.Node) {
		cloud := AWS{AutoDiscoveryTags: []string{"k8s.io/cluster-autoscaler/enabled"}}
		kwok := Kwok{BootDelay: 20 * time.Second, ResumeDelay: 5 * time.Second}
		var chosen []string
		choose := func(name string, read reader) reader {
			return func(d *decoder, at string, n *yaml.Node) {
				chosen = append(chosen, name)
				read(d, at, n)
			}
		}
		before := len(d.problems)
		object(fields{
			"kwok": choose("kwok", object(fields{
				"bootDelay":   span(&kwok.BootDelay, 0),
				"resumeDelay": span(&kwok.ResumeDelay, 0),
			}, nil)),
			"aws": choose("aws", aws(&cloud)),
		}, nil)(d, at, n)
		switch {
		case len(chosen) == 0 && len(d.problems) == before:
			d.refuse(at, wantBackend, "none")
		case len(chosen) > 1:
			d.refuse(at, wantBackend, "both")
		case slices.Contains(chosen, "kwok"):
			b.Kwok = &kwok
		case slices.Contains(chosen, "aws"):
			b.AWS = &cloud
		}
	}
}

// aws reads the backend on Auto Scaling groups. The bound of a tag's key is
// AWS's.
func aws(a *AWS) reader {
	const wantURL = "a URL such as http://127.0.0.1:4566, or nothing"
	const wantTag = "the key of a tag, or key=value"
	const wantPrice = "US dollars an hour such as 0.384"
	var given []string
	var prices map[string]string
	read := object(fields{
		"region": text(&a.Region, "a region such as eu-central-1, or nothing", func(s string) bool { return s == "" || len(validation.IsDNS1123Label(s)) == 0 }),
		"endpoint": text(&a.Endpoint, wantURL, func(s string) bool {
			u, err := url.Parse(s)
			return s == "" || err == nil && u.Host != "" && (u.Scheme == "http" || u.Scheme == "https")
		}),
		"autoDiscoveryTags": list(50, func() reader {
			return func(d *decoder, at string, n *yaml.Node) {
				var tag string
				text(&tag, wantTag, func(s string) bool {
					key, _, _ := strings.Cut(s, "=")
					return key != "" && len(key) <= 128
				})(d, at, n)
				given = append(given, tag)
			}
		}),
		"prices": table(&prices, wantPrice, func(_, value string) string {
			if dollars, err := strconv.ParseFloat(value, 64); err != nil || dollars < 0 || math.IsInf(dollars, 0) || math.IsNaN(dollars) {
				return wantPrice
			}
			return ""
		}, "!!int", "!!float", "!!str"),
		"dryRun": boolean(&a.DryRun),
	}, nil)
	return func(d *decoder, at string, n *yaml.Node) {
		read(d, at, n)
		if tags := valueOf(n, "autoDiscoveryTags"); tags != nil && !null(tags) {
			a.AutoDiscoveryTags = given
		}
		for instanceType, dollars := range prices {
			if a.Prices == nil {
				a.Prices = map[string]float64{}
			}
			a.Prices[instanceType], _ = strconv.ParseFloat(dollars, 64)
		}
	}
}

// scalingGroup reads what the file adds to an Auto Scaling group: sizes and
// template are the group's own.
func scalingGroup(groups *[]model.NodeGroup) reader {
	return func(d *decoder, at string, n *yaml.Node) {
		const want = "the name of an Auto Scaling group"
		var g model.NodeGroup
		var id string
		object(fields{
			"id":          text(&id, want, func(s string) bool { return s != "" && len([]rune(s)) <= 255 }),
			"annotations": table(&g.Annotations, "a text (in quotes if it looks like a number)", annotation, "!!str"),
		}, required{"id": want})(d, at, n)
		g.ID = model.GroupID(id)
		*groups = append(*groups, g)
	}
}

func engines(e *Engines) reader {
	return object(fields{
		"podSelector": text(&e.PodSelector, "a label selector such as app.kubernetes.io/name=dagger-helm", func(s string) bool {
			_, err := labels.Parse(s)
			return err == nil && s != ""
		}),
		"namespaces":  namespaces(&e.Namespaces),
		"metricsPort": whole(&e.MetricsPort, 1, 65535, "a port from 1 to 65535"),
	}, nil)
}

func namespaces(into *[]string) reader {
	return list(100, func() reader {
		*into = append(*into, "")
		return text(&(*into)[len(*into)-1], "the name of a namespace", func(s string) bool {
			return len(validation.IsDNS1123Label(s)) == 0
		})
	})
}

func placement(into **Placement) reader {
	return func(d *decoder, at string, n *yaml.Node) {
		if null(n) {
			return
		}
		p := &Placement{Address: ":8443"}
		object(fields{
			"address": address(&p.Address),
			"tls": object(fields{
				"certFile": anyText(&p.CertFile),
				"keyFile":  anyText(&p.KeyFile),
			}, nil),
		}, nil)(d, at, n)
		if (p.CertFile == "") != (p.KeyFile == "") {
			d.problem(join(at, "tls"), "want both of certFile, keyFile or none of them")
		}
		*into = p
	}
}

func ci(c *CI) reader {
	g := &c.GitHub
	github := object(fields{
		"webhookSecretFile": anyText(&g.WebhookSecretFile),
		"tokenFile":         anyText(&g.TokenFile),
		"apiURL":            webAddress(&g.APIURL, "https://github.example.com/api/v3"),
		"repositories": list(1000, func() reader {
			g.Repositories = append(g.Repositories, "")
			return text(&g.Repositories[len(g.Repositories)-1], "a repository such as acme/shop", func(s string) bool {
				return repository.MatchString(s)
			})
		}),
		"pollInterval": span(&g.PollInterval, 10*time.Second),
	}, nil)
	return object(fields{
		"github": func(d *decoder, at string, n *yaml.Node) {
			github(d, at, n)
			if (len(g.Repositories) > 0) != (g.TokenFile != "") {
				d.problem(at, "want both of tokenFile, repositories or none of them")
			}
		},
		"gitlab": func(d *decoder, at string, n *yaml.Node) {
			object(fields{
				"webhookTokenFile":  anyText(&c.GitLab.WebhookTokenFile),
				"signingSecretFile": anyText(&c.GitLab.SigningSecretFile),
				"url":               webAddress(&c.GitLab.URL, "https://gitlab.example.com"),
				"tokenFile":         anyText(&c.GitLab.TokenFile),
			}, nil)(d, at, n)
			if (c.GitLab.URL == "") != (c.GitLab.TokenFile == "") {
				d.problem(at, "want both of url, tokenFile or none of them")
			}
			if c.GitLab.SigningSecretFile != "" && c.GitLab.WebhookTokenFile == "" {
				d.problem(at, "signingSecretFile wants webhookTokenFile too")
			}
		},
		"buildkite": object(fields{"webhookTokenFile": anyText(&c.Buildkite.WebhookTokenFile)}, nil),
	}, nil)
}

// webAddress reads a URL, or nothing.
func webAddress(into *string, example string) reader {
	return text(into, "an address such as "+example, func(s string) bool {
		u, err := url.Parse(s)
		return s == "" || err == nil && (u.Scheme == "https" || u.Scheme == "http") && u.Host != ""
	})
}

// repository is what GitHub takes for an owner and a name.
var repository = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{0,38}/[A-Za-z0-9._-]{1,100}$`)

// group reads one node group and appends it.
func group(groups *[]model.NodeGroup) reader {
	return func(d *decoder, at string, n *yaml.Node) {
		g := model.NodeGroup{Max: -1}
		var id string
		object(fields{
			// The id names the RunnerNodeGroup object and is the value of a
			// label on every node: it has to be fit for both.
			"id": text(&id, wantID, func(s string) bool {
				return len(s) <= validation.LabelValueMaxLength && len(validation.IsDNS1123Subdomain(s)) == 0
			}),
			"min":         whole(&g.Min, math.MinInt, math.MaxInt, "a whole number from 0 to max"),
			"max":         whole(&g.Max, 0, 100000, wantMax),
			"template":    template(&g.Template),
			"annotations": table(&g.Annotations, "a text (in quotes if it looks like a number)", annotation, "!!str"),
		}, required{"id": wantID, "max": wantMax, "template": "what a node looks like"})(d, at, n)
		if g.Max >= 0 && (g.Min < 0 || g.Min > g.Max) {
			d.refuse(join(at, "min"), fmt.Sprintf("a whole number from 0 to max (%d)", g.Max), strconv.Itoa(g.Min))
		}
		g.ID = model.GroupID(id)
		*groups = append(*groups, g)
	}
}

func (d *decoder) uniqueGroups(groups []model.NodeGroup) {
	first := map[model.GroupID]int{}
	for i, g := range groups {
		if g.ID == "" {
			continue
		}
		if j, ok := first[g.ID]; ok {
			d.problem(fmt.Sprintf("nodeGroups[%d].id", i), fmt.Sprintf("want an id of its own, got that of nodeGroups[%d] (%q)", j, string(g.ID)))
			continue
		}
		first[g.ID] = i
	}
}

func annotation(key, _ string) (want string) {
	if len(validation.IsQualifiedName(key)) > 0 {
		return "an annotation key such as hearth.dev/min-warm"
	}
	return ""
}

func template(t *model.Template) reader {
	labelValue := func(s string) bool { return len(validation.IsValidLabelValue(s)) == 0 }
	read := object(fields{
		"capacity":     resources(&t.Capacity),
		"allocatable":  resources(&t.Allocatable),
		"labels":       table(&t.Labels, "a text (in quotes if it looks like a number)", label, "!!str"),
		"taints":       list(100, func() reader { return taint(&t.Taints) }),
		"zone":         text(&t.Zone, "a label value", labelValue),
		"instanceType": text(&t.InstanceType, "a label value", labelValue),
	}, required{"capacity": "cpu, memory and pods"})
	return func(d *decoder, at string, n *yaml.Node) {
		read(d, at, n)
		if t.Capacity == nil {
			return
		}
		for _, name := range []string{"cpu", "memory", "pods"} {
			field := fmt.Sprintf("%s.capacity[%q]", at, name)
			value, ok := t.Capacity[name]
			if _, tried := d.lines[field]; !ok && !tried {
				d.refuse(field, "a quantity greater than 0", "nothing")
			} else if value == "0" {
				d.refuse(field, "a quantity greater than 0", "0")
			}
		}
		d.allocatable(at, t)
	}
}

// allocatable checks the declared part of the capacity that pods can have and
// fills it up with what was not declared.
func (d *decoder) allocatable(at string, t *model.Template) {
	if len(t.Allocatable) == 0 {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(t.Allocatable)) {
		field := fmt.Sprintf("%s.allocatable[%q]", at, name)
		capacity, ok := t.Capacity[name]
		if !ok {
			d.problem(field, "want a resource that capacity has")
			continue
		}
		have, most := resource.MustParse(t.Allocatable[name]), resource.MustParse(capacity)
		if have.Cmp(most) > 0 {
			d.refuse(field, fmt.Sprintf("at most the capacity (%s)", capacity), have.String())
		}
	}
	for name, capacity := range t.Capacity {
		if _, ok := t.Allocatable[name]; !ok {
			t.Allocatable[name] = capacity
		}
	}
}

// resources reads quantities and keeps them in their canonical form.
func resources(into *map[string]string) reader {
	const want = `a quantity from 0 to 1E such as "8", 500m or 32Gi`
	read := table(into, want, func(name, value string) string {
		if len(validation.IsQualifiedName(name)) > 0 {
			return "the name of a resource such as cpu, memory, pods or nvidia.com/gpu"
		}
		if _, ok := quantity(value); !ok {
			return want
		}
		return ""
	}, "!!str", "!!int", "!!float")
	return func(d *decoder, at string, n *yaml.Node) {
		read(d, at, n)
		for name, value := range *into {
			q, _ := quantity(value)
			(*into)[name] = q.String()
		}
	}
}

// quantity parses what a person may write: at most 1E, and with at most two
// digits of exponent, because the parser's work grows with the exponent.
func quantity(s string) (resource.Quantity, bool) {
	if !quantityForm.MatchString(s) {
		return resource.Quantity{}, false
	}
	q, err := resource.ParseQuantity(s)
	return q, err == nil && q.Sign() >= 0 && q.Cmp(resource.MustParse("1E")) <= 0
}

var quantityForm = regexp.MustCompile(`^[0-9.]{1,20}([eE][0-9]{1,2}|[a-zA-Z]{0,2})$`)

func label(key, value string) (want string) {
	switch {
	case len(validation.IsQualifiedName(key)) > 0:
		return "a label key such as example.com/team"
	case key == nodeGroupLabel || key == hostnameLabel || strings.HasPrefix(key, warmLabelPrefix):
		return "no value: Hearth sets this label itself"
	case len(validation.IsValidLabelValue(value)) > 0:
		return "a label value: at most 63 letters, digits, dots, dashes and underscores"
	}
	return ""
}

func taint(taints *[]model.Taint) reader {
	return func(d *decoder, at string, n *yaml.Node) {
		var t model.Taint
		object(fields{
			"key":   text(&t.Key, wantTaintKey, func(s string) bool { return len(validation.IsQualifiedName(s)) == 0 }),
			"value": text(&t.Value, "a label value", func(s string) bool { return len(validation.IsValidLabelValue(s)) == 0 }),
			"effect": text(&t.Effect, wantEffect, func(s string) bool {
				return slices.Contains([]string{"NoSchedule", "PreferNoSchedule", "NoExecute"}, s)
			}),
		}, required{"key": wantTaintKey, "effect": wantEffect})(d, at, n)
		*taints = append(*taints, t)
	}
}
