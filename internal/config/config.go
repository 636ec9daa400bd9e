// Package config reads Hearth's config file: strictly, with every problem
// reported at once, and again whenever the file changes. It owns the file's
// schema, its defaults and the order in which a change takes effect. It never
// interprets annotations (pkg/nodegroups does), opens a listener or talks to a
// cluster.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// Limits of a config file.
const (
	MaxBytes  = 1 << 20
	MaxGroups = 1000
)

// What apiVersion and kind must say.
const (
	APIVersion = model.Prefix + "/v1alpha1"
	Kind       = "ProviderConfig"
)

// Config is a valid config file. It does not change once it is made.
type Config struct {
	Server         Server
	HTTP           HTTP
	Log            Log
	Kubernetes     Kubernetes
	LeaderElection LeaderElection
	Backend        Backend
	Engines        Engines
	CI             CI
	Placement      *Placement // nil: no placement webhook

	source   []byte
	groups   []model.NodeGroup
	lines    map[string]int // of the fields that were in the file
	problems []Problem
	warnings []Problem
}

// Server is where cluster-autoscaler connects. Addresses are host:port.
type Server struct {
	Address         string
	ExpanderAddress string
	TLS             TLS
}

// TLS names PEM files; either none or all are set.
type TLS struct {
	CertFile, KeyFile, ClientCAFile string
}

// Enabled says whether the files are set.
func (t TLS) Enabled() bool { return t.CertFile != "" }

// HTTP is where metrics and probes are served, as host:port.
type HTTP struct{ Address string }

// Log says what is logged. It takes effect on a reload, too.
type Log struct {
	// Level is debug, info, warn or error; empty: what --log-level says.
	Level string
}

// Kubernetes says how to reach the API server. An empty Kubeconfig means
// in-cluster.
type Kubernetes struct{ Kubeconfig string }

// LeaderElection says how replicas agree on who acts.
type LeaderElection struct {
	Enabled   bool
	Namespace string // of the Lease and of what was learnt
	// As in client-go: LeaseDuration > RenewDeadline > RetryPeriod.
	LeaseDuration, RenewDeadline, RetryPeriod time.Duration
}

// Backend is where instances come from. Exactly one is set.
type Backend struct {
	Kwok *Kwok
	AWS  *AWS
}

// AWS is the backend on Amazon EC2 Auto Scaling.
type AWS struct {
	// Region and Endpoint are those of the SDK's own search when empty
	// (AWS_REGION, AWS_ENDPOINT_URL, profiles, instance metadata).
	Region, Endpoint string
	// AutoDiscoveryTags select Auto Scaling groups that have all of them: a key,
	// or key=value. None selects only the groups that nodeGroups names.
	AutoDiscoveryTags []string
	// Prices are what an hour of an instance type costs, in US dollars.
	Prices map[string]float64
	// DryRun changes nothing and refuses cluster-autoscaler's writes.
	DryRun bool
}

// Kwok is the embedded backend: instances are Node objects on any cluster.
type Kwok struct {
	BootDelay   time.Duration // launch to Node object
	ResumeDelay time.Duration // the same for a parked instance
}

// CI says how CI systems are heard. A system without a secret is not.
type CI struct {
	GitHub    GitHubCI
	GitLab    GitLabCI
	Buildkite BuildkiteCI
}

// GitHubCI is GitHub: its webhooks and, with a token, asking it.
type GitHubCI struct {
	WebhookSecretFile string
	TokenFile         string
	APIURL            string   // of an Enterprise Server; empty: github.com's
	Repositories      []string // as owner/name
	PollInterval      time.Duration
}

// GitLabCI is GitLab's webhooks. SigningSecretFile is for servers that sign; URL
// and TokenFile are for asking the server for the tags of pending jobs.
type GitLabCI struct{ WebhookTokenFile, SigningSecretFile, URL, TokenFile string }

// BuildkiteCI is Buildkite's webhooks.
type BuildkiteCI struct{ WebhookTokenFile string }

// Engines says how to find and read Dagger engines.
type Engines struct {
	PodSelector string // a label selector
	// Namespaces in which engines are looked for; none means all.
	Namespaces  []string
	MetricsPort int
}

// Placement is the admission webhook that leads jobs to warm nodes.
type Placement struct {
	Address string // host:port
	// CertFile and KeyFile are PEM files, both or none: without them Hearth
	// makes its own certificate and keeps it in a Secret.
	CertFile, KeyFile string
}

// NodeGroups returns the declared groups in the file's order. The caller must
// not change them.
func (c *Config) NodeGroups() []model.NodeGroup { return c.groups }

// Problems lists annotations that could not be used: the groups work without
// them.
func (c *Config) Problems() []Problem { return c.problems }

// Warnings lists fields that are accepted and have no effect.
func (c *Config) Warnings() []Problem { return c.warnings }

// Problem is one finding about one field.
type Problem struct {
	File  string
	Line  int    // 0 when the field is not in the file
	Field string // path, such as nodeGroups[1].min
	Text  string // what is wanted and what was found
}

func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d", p.Line)
	}
	if p.Field != "" {
		fmt.Fprintf(&b, ": %s", p.Field)
	}
	fmt.Fprintf(&b, ": %s", p.Text)
	return b.String()
}

// Invalid says everything that is wrong with a config file, in the order of
// its lines. It is never empty.
type Invalid struct{ Problems []Problem }

func (e *Invalid) Error() string {
	const most = 50
	var lines []string
	for _, p := range e.Problems[:min(len(e.Problems), most)] {
		lines = append(lines, p.String())
	}
	if more := len(e.Problems) - most; more > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(lines, "\n")
}

// Load reads and checks the file at path, and that the files which it names
// can be read. The error is *Invalid unless path itself cannot be read.
func Load(path string) (*Config, error) {
	data, err := read(path)
	if err != nil {
		return nil, err
	}
	return load(data, path)
}

func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading config: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxBytes+1))
	if err != nil {
		return nil, fmt.Errorf("reading config: %w", err)
	}
	return data, nil
}

func load(data []byte, path string) (*Config, error) {
	c, err := Parse(data, path)
	if err != nil {
		return nil, err
	}
	d := decoder{file: path, lines: c.lines}
	files := map[string]string{
		"server.tls.certFile":     c.Server.TLS.CertFile,
		"server.tls.keyFile":      c.Server.TLS.KeyFile,
		"server.tls.clientCAFile": c.Server.TLS.ClientCAFile,
		"kubernetes.kubeconfig":   c.Kubernetes.Kubeconfig,
	}
	if p := c.Placement; p != nil {
		files["placement.tls.certFile"], files["placement.tls.keyFile"] = p.CertFile, p.KeyFile
	}
	for field, file := range files {
		if file == "" {
			continue
		}
		if err := readable(file); err != nil {
			d.refuse(field, "a file that can be read", err.Error())
		}
	}
	if err := d.invalid(); err != nil {
		return nil, err
	}
	return c, nil
}

func readable(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.IsDir() {
		return fmt.Errorf("the folder %s", file)
	}
	return nil
}

// Parse checks the text of a config file; name stands for it in problems. The
// error is *Invalid.
func Parse(data []byte, name string) (*Config, error) {
	d := &decoder{file: name, lines: map[string]int{}}
	c := &Config{
		Server:     Server{Address: ":8086", ExpanderAddress: ":8088"},
		HTTP:       HTTP{Address: ":8087"},
		Kubernetes: Kubernetes{},
		LeaderElection: LeaderElection{
			Enabled: true, Namespace: "hearth",
			// Long enough to lead on, and answer from memory, while the API
			// server is away for half a minute.
			LeaseDuration: 60 * time.Second, RenewDeadline: 45 * time.Second, RetryPeriod: 5 * time.Second,
		},
		CI:      CI{GitHub: GitHubCI{PollInterval: time.Minute}},
		Engines: Engines{PodSelector: "app.kubernetes.io/name=dagger-helm", MetricsPort: 9090},
	}
	if root := d.document(data); root != nil {
		d.root(c, root)
	}
	if err := d.invalid(); err != nil {
		return nil, err
	}
	if host, _, _ := net.SplitHostPort(c.Server.Address); !c.Server.TLS.Enabled() && !loopback(host) {
		d.warn("server.tls", "is not set: whoever reaches server.address can launch and delete nodes")
	}
	c.source, c.lines, c.warnings = bytes.Clone(data), d.lines, d.warnings
	c.problems = annotationProblems(c, name)
	return c, nil
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// annotationProblems reports annotations that the groups have to do without.
func annotationProblems(c *Config, file string) []Problem {
	var problems []Problem
	for i, group := range c.groups {
		report := func(key, text string) {
			field := fmt.Sprintf("nodeGroups[%d].annotations[%q]", i, key)
			problems = append(problems, Problem{File: file, Line: c.lines[field], Field: field, Text: text})
		}
		merged := nodegroups.Merge(group.Annotations)
		_, bad := nodegroups.ParseSettings(group, merged)
		for _, b := range bad {
			report(b.Key, fmt.Sprintf("want %s, got %q; the default is used", b.Want, b.Value))
		}
		for key := range group.Annotations {
			if _, ours := merged[key]; !ours {
				report(key, "ignored: want a key that starts with "+model.Prefix+"/")
			}
		}
	}
	sortProblems(problems)
	return problems
}

// invalid returns what was refused so far, nil when nothing was.
func (d *decoder) invalid() error {
	if len(d.problems) == 0 {
		return nil
	}
	sortProblems(d.problems)
	return &Invalid{Problems: d.problems}
}

// sortProblems orders by line; what has no line goes last.
func sortProblems(problems []Problem) {
	slices.SortFunc(problems, func(a, b Problem) int {
		if (a.Line == 0) != (b.Line == 0) {
			if a.Line == 0 {
				return 1
			}
			return -1
		}
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return strings.Compare(a.Field, b.Field)
	})
}

// restartFields are the values of all fields whose change cannot take effect at
// run time. Node groups are not among them.
func restartFields(c *Config) map[string]any {
	kwok, cloud, placement := Kwok{}, AWS{}, Placement{}
	if c.Backend.Kwok != nil {
		kwok = *c.Backend.Kwok
	}
	if c.Backend.AWS != nil {
		cloud = *c.Backend.AWS
	}
	if c.Placement != nil {
		placement = *c.Placement
	}
	return map[string]any{
		"placement.address":            placement.Address,
		"placement.tls.certFile":       placement.CertFile,
		"placement.tls.keyFile":        placement.KeyFile,
		"server.address":               c.Server.Address,
		"server.expanderAddress":       c.Server.ExpanderAddress,
		"server.tls.certFile":          c.Server.TLS.CertFile,
		"server.tls.keyFile":           c.Server.TLS.KeyFile,
		"server.tls.clientCAFile":      c.Server.TLS.ClientCAFile,
		"http.address":                 c.HTTP.Address,
		"kubernetes.kubeconfig":        c.Kubernetes.Kubeconfig,
		"leaderElection.enabled":       c.LeaderElection.Enabled,
		"leaderElection.namespace":     c.LeaderElection.Namespace,
		"leaderElection.leaseDuration": c.LeaderElection.LeaseDuration,
		"leaderElection.renewDeadline": c.LeaderElection.RenewDeadline,
		"leaderElection.retryPeriod":   c.LeaderElection.RetryPeriod,
		"backend":                      backendName(c.Backend),
		"backend.kwok.bootDelay":       kwok.BootDelay,
		"backend.kwok.resumeDelay":     kwok.ResumeDelay,
		"backend.aws.region":           cloud.Region,
		"backend.aws.endpoint":         cloud.Endpoint,
		"backend.aws.dryRun":           cloud.DryRun,
		// As one text, since the values must be comparable.
		"backend.aws.prices":            fmt.Sprint(cloud.Prices),
		"backend.aws.autoDiscoveryTags": strings.Join(cloud.AutoDiscoveryTags, ", "),
		"engines.podSelector":           c.Engines.PodSelector,
		"engines.namespaces":            strings.Join(c.Engines.Namespaces, ", "),
		"engines.metricsPort":           c.Engines.MetricsPort,
		"ci.github.webhookSecretFile":   c.CI.GitHub.WebhookSecretFile,
		"ci.github.tokenFile":           c.CI.GitHub.TokenFile,
		"ci.github.apiURL":              c.CI.GitHub.APIURL,
		"ci.github.repositories":        strings.Join(c.CI.GitHub.Repositories, ", "),
		"ci.github.pollInterval":        c.CI.GitHub.PollInterval,
		"ci.gitlab.webhookTokenFile":    c.CI.GitLab.WebhookTokenFile,
		"ci.gitlab.url":                 c.CI.GitLab.URL,
		"ci.gitlab.tokenFile":           c.CI.GitLab.TokenFile,
		"ci.gitlab.signingSecretFile":   c.CI.GitLab.SigningSecretFile,
		"ci.buildkite.webhookTokenFile": c.CI.Buildkite.WebhookTokenFile,
	}
}

// Replaceable says whether next can take the place of c in a running process:
// nil, or *Invalid naming every field that needs a restart.
func (c *Config) Replaceable(next *Config, file string) error {
	d := decoder{file: file, lines: next.lines}
	was := restartFields(c)
	for field, now := range restartFields(next) {
		if now != was[field] {
			d.problem(field, fmt.Sprintf("needs a restart to change from %s to %s", show(was[field]), show(now)))
		}
	}
	return d.invalid()
}

func backendName(b Backend) string {
	if b.AWS != nil {
		return "aws"
	}
	return "kwok"
}

func show(v any) string {
	if s, ok := v.(string); ok {
		return fmt.Sprintf("%q", s)
	}
	return fmt.Sprint(v)
}

// IsInvalid says whether err is about the content of a config file.
func IsInvalid(err error) bool {
	_, ok := errors.AsType[*Invalid](err)
	return ok
}
