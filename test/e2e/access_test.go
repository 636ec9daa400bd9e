package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"

	"github.com/hearth-ci/hearth/deploy"
	"github.com/hearth-ci/hearth/internal/localcluster"
)

// canary is in every secret of these tests, and must be in nothing that Hearth
// writes.
const canary = "canary-e2e-7d1f"

// right is one verb on one resource that a role grants.
type right struct{ role, verb, resource string }

func (r right) String() string { return fmt.Sprintf("%s: %s %s", r.role, r.verb, r.resource) }

// used are the rights by which the API server let Hearth in, in all tests.
var used = struct {
	sync.Mutex
	rights map[right]bool
}{rights: map[right]bool{}}

// byRole is how the RBAC authorizer says why it let somebody in.
var byRole = regexp.MustCompile(`of (ClusterRole|Role) "([^"]+)" to`)

// checkAccess reads what Hearth asked of the API server: nothing may have been
// forbidden that no role grants.
func (g *ground) checkAccess() {
	granted, err := grantedRights()
	g.must(err)
	file, err := os.Open(filepath.Join(g.Cluster.LogDir(), localcluster.AuditLog))
	if err != nil {
		g.t.Errorf("reading what was asked: %v", err)
		return
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 4<<20)
	for lines.Scan() {
		var e struct {
			Verb        string
			RequestURI  string
			ObjectRef   struct{ Resource, Subresource, APIGroup, Namespace, Name string }
			Annotations map[string]string
		}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			continue // the last one, when the API server was killed
		}
		name := e.ObjectRef.Resource
		if e.ObjectRef.APIGroup != "" {
			name += "." + e.ObjectRef.APIGroup
		}
		if e.ObjectRef.Subresource != "" {
			name += "/" + e.ObjectRef.Subresource
		}
		reason := e.Annotations["authorization.k8s.io/reason"]
		switch e.Annotations["authorization.k8s.io/decision"] {
		case "allow":
			role := byRole.FindStringSubmatch(reason)
			if role == nil || !strings.HasPrefix(role[2], "hearth") {
				continue // discovery, which is everybody's
			}
			used.Lock()
			used.rights[right{role[1] + " " + role[2], e.Verb, name}] = true
			used.Unlock()
		case "forbid":
			// An API server that has just started forbids what it has yet to read
			// that it grants.
			if !slices.ContainsFunc(granted, func(r right) bool { return r.verb == e.Verb && r.resource == name }) {
				g.t.Errorf("not granted to Hearth: %s %s", e.Verb, e.RequestURI)
			}
		}
	}
}

// checkSecrets looks for secrets in everything that Hearth wrote.
func (g *ground) checkSecrets() {
	logs, err := filepath.Glob(filepath.Join(g.Cluster.LogDir(), "hearth*.log"))
	if err != nil {
		g.t.Errorf("looking for logs: %v", err)
	}
	secrets := map[string]string{"a planted secret": canary, "a private key": "PRIVATE KEY"}
	if token := g.Token(); token != "" {
		secrets["the service account's token"] = token
	}
	for _, path := range logs {
		text, err := os.ReadFile(path)
		if err != nil {
			g.t.Errorf("reading a log: %v", err)
		}
		for what, secret := range secrets {
			if strings.Contains(string(text), secret) {
				g.t.Errorf("%s has %s in it", filepath.Base(path), what)
			}
		}
	}
}

// everything says whether all tests were run.
func everything() bool {
	for _, name := range []string{"test.run", "test.skip", "test.list"} {
		if flag.Lookup(name).Value.String() != "" {
			return false
		}
	}
	return !onAWS()
}

// elsewhere are rights that no test here can use: why not.
func elsewhere() map[string]string {
	return map[string]string{
		"ephemeralrunners.actions.github.com":   "its kind is not installed here; internal/kube reads it from a fake",
		"Role hearth: patch pods":               "the ClusterRole grants it already, so that the authorizer never gets to it",
		"Role hearth-placement: update secrets": "a certificate is renewed after months; internal/placement does it in virtual time",
		"Role hearth-kwok":                      "the Role hearth grants the same, so that the authorizer may not get to it",
	}
}

// unusedRights names the rights that the manifests grant and nothing used.
func unusedRights() error {
	granted, err := grantedRights()
	if err != nil {
		return err
	}
	used.Lock()
	defer used.Unlock()
	var errs []error
	for _, r := range granted {
		known := false
		for text := range elsewhere() {
			known = known || strings.Contains(r.String(), text)
		}
		if !used.rights[r] && !known {
			errs = append(errs, fmt.Errorf("granted, but nothing used it: %s", r))
		}
	}
	return errors.Join(errs...)
}

func grantedRights() (rights []right, err error) {
	for _, manifest := range [][]byte{deploy.RBAC(), deploy.RBACKwok(), deploy.RBACPlacement()} {
		for part := range strings.SplitSeq(string(manifest), "\n---\n") {
			var role rbacv1.ClusterRole // a Role has the same fields
			if err := yaml.Unmarshal([]byte(part), &role); err != nil {
				return nil, err
			}
			if role.Kind != "ClusterRole" && role.Kind != "Role" {
				continue
			}
			for _, rule := range role.Rules {
				for _, resource := range rule.Resources {
					name, sub, _ := strings.Cut(resource, "/")
					if group := rule.APIGroups[0]; group != "" {
						name += "." + group
					}
					if sub != "" {
						name += "/" + sub
					}
					for _, verb := range rule.Verbs {
						if verb == "*" || slices.Contains(rule.APIGroups, "*") || resource == "*" {
							return nil, fmt.Errorf("%s %s grants more than can be listed", role.Kind, role.Name)
						}
						rights = append(rights, right{role.Kind + " " + role.Name, verb, name})
					}
				}
			}
		}
	}
	return rights, nil
}
