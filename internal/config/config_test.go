package config_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/hearth-ci/hearth/internal/config"
	"github.com/hearth-ci/hearth/pkg/model"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const head = `apiVersion: hearth.dev/v1alpha1
kind: ProviderConfig
`

const valid = head + `backend: {kwok: {}}
nodeGroups:
- id: runners-a
  max: 20
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}}
`

// TestFiles runs the stories in testdata: a config file in, everything that
// is made of it or everything that is wrong with it out.
func TestFiles(t *testing.T) {
	datadriven.Walk(t, "testdata/files", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			input := d.Input
			if d.Cmd == "body" { // apiVersion and kind are not what it is about
				input = head + input
			}
			c, err := config.Parse([]byte(input), "hearth.yaml")
			if err != nil {
				if !config.IsInvalid(err) {
					t.Errorf("%T is not *Invalid", err)
				}
				return err.Error() + "\n"
			}
			return dump(c)
		})
	})
}

func dump(c *config.Config) string {
	var b strings.Builder
	fmt.Fprintf(&b, "server %+v\nhttp %+v\nkubernetes %+v\nleaderElection %+v\n", c.Server, c.HTTP, c.Kubernetes, c.LeaderElection)
	if k := c.Backend.Kwok; k != nil {
		fmt.Fprintf(&b, "kwok %+v\n", *k)
	}
	if a := c.Backend.AWS; a != nil {
		fmt.Fprintf(&b, "aws %+v\n", *a)
	}
	fmt.Fprintf(&b, "engines %+v\n", c.Engines)
	if p := c.Placement; p != nil {
		fmt.Fprintf(&b, "placement %+v\n", *p)
	}
	for _, g := range c.NodeGroups() {
		fmt.Fprintf(&b, "group %+v\n", g)
	}
	for _, p := range c.Problems() {
		fmt.Fprintf(&b, "problem %s\n", p)
	}
	for _, w := range c.Warnings() {
		fmt.Fprintf(&b, "warning %s\n", w)
	}
	return b.String()
}

func TestLoadNamesFilesThatCannotBeRead(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "hearth.yaml")
	cert := filepath.Join(dir, "tls.crt")
	write(t, cert, "any")
	write(t, path, valid+fmt.Sprintf("server:\n  tls:\n    certFile: %s\n    keyFile: %s/missing.key\n    clientCAFile: %s\n", cert, dir, dir))
	_, err := config.Load(path)
	want := fmt.Sprintf(`%[1]s:11: server.tls.keyFile: want a file that can be read, got open %[2]s/missing.key: no such file or directory
%[1]s:12: server.tls.clientCAFile: want a file that can be read, got the folder %[2]s`, path, dir)
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}

	_, err = config.Load(filepath.Join(dir, "none.yaml"))
	if !errors.Is(err, os.ErrNotExist) || config.IsInvalid(err) {
		t.Errorf("a missing file: got %v", err)
	}
}

func TestLimits(t *testing.T) {
	big := valid + "#" + strings.Repeat("x", config.MaxBytes)
	var groups strings.Builder
	groups.WriteString(head + "backend: {kwok: {}}\nnodeGroups:\n")
	for i := range config.MaxGroups + 1 {
		fmt.Fprintf(&groups, "- {id: g%d, max: 1, template: {capacity: {cpu: 1, memory: 1Gi, pods: 10}}}\n", i)
	}
	for name, tc := range map[string]struct{ in, want string }{
		"bytes":  {big, "hearth.yaml: want at most 1048576 bytes"},
		"groups": {groups.String(), "hearth.yaml:5: nodeGroups: want a list of at most 1000 items, got 1001"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := config.Parse([]byte(tc.in), "hearth.yaml")
			if err == nil || err.Error() != tc.want {
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
	most := strings.TrimSuffix(groups.String(), fmt.Sprintf("- {id: g%d, max: 1, template: {capacity: {cpu: 1, memory: 1Gi, pods: 10}}}\n", config.MaxGroups))
	c, err := config.Parse([]byte(most), "hearth.yaml")
	if err != nil || len(c.NodeGroups()) != config.MaxGroups {
		t.Errorf("%d groups: got %v", config.MaxGroups, err)
	}

	// As many problems as one likes make a message of bounded length.
	_, err = config.Parse([]byte(head+strings.Repeat("x: 1\n", 1000)), "hearth.yaml")
	if lines := strings.Split(err.Error(), "\n"); len(lines) != 51 || lines[50] != "and 951 more" {
		t.Errorf("got %d lines, the last %q", len(lines), lines[len(lines)-1])
	}
}

func TestReplaceable(t *testing.T) {
	parse := func(text string) *config.Config {
		c, err := config.Parse([]byte(text), "hearth.yaml")
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	old := parse(valid)
	for _, tc := range []struct{ name, text, want string }{
		{"groups may change", strings.ReplaceAll(valid, "max: 20", "max: 21") + "- {id: b, max: 1, template: {capacity: {cpu: 1, memory: 1Gi, pods: 1}}}\n", ""},
		{"backend and engines", strings.ReplaceAll(valid, "kwok: {}", "kwok: {bootDelay: 1s}") + "engines: {metricsPort: 1}\n", `hearth.yaml:3: backend.kwok.bootDelay: needs a restart to change from 20s to 1s
hearth.yaml:8: engines.metricsPort: needs a restart to change from 9090 to 1`},
		{"a default written out is no change", valid + "http: {address: ':8087'}\n", ""},
		{"addresses", valid + "server:\n  address: ':1'\n  expanderAddress: ':2'\nhttp: {address: ':3'}\n", `hearth.yaml:9: server.address: needs a restart to change from ":8086" to ":1"
hearth.yaml:10: server.expanderAddress: needs a restart to change from ":8088" to ":2"
hearth.yaml:11: http.address: needs a restart to change from ":8087" to ":3"`},
		{"placement", valid + "placement: {tls: {certFile: c, keyFile: k}}\n", `hearth.yaml:8: placement.address: needs a restart to change from "" to ":8443"
hearth.yaml:8: placement.tls.certFile: needs a restart to change from "" to "c"
hearth.yaml:8: placement.tls.keyFile: needs a restart to change from "" to "k"`},
		{"the rest", valid + "kubernetes: {kubeconfig: /k}\nleaderElection: {enabled: false, leaseDuration: 90s}\n", `hearth.yaml:8: kubernetes.kubeconfig: needs a restart to change from "" to "/k"
hearth.yaml:9: leaderElection.enabled: needs a restart to change from true to false
hearth.yaml:9: leaderElection.leaseDuration: needs a restart to change from 1m0s to 1m30s`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := ""
			if err := old.Replaceable(parse(tc.text), "hearth.yaml"); err != nil {
				got = err.Error()
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	// A field that went back to its default has no line.
	if err := parse(valid+"http: {address: ':1'}\n").Replaceable(old, "hearth.yaml"); err == nil || err.Error() != `hearth.yaml: http.address: needs a restart to change from ":1" to ":8087"` {
		t.Errorf("got %v", err)
	}
}

// watched is a running Watch with its outcomes.
type watched struct {
	applied  chan *config.Config
	reloaded chan error
}

func watch(t *testing.T, path string, refuse error) watched {
	t.Helper()
	current, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	w := watched{make(chan *config.Config, 100), make(chan error, 100)}
	done := make(chan error)
	go func() {
		done <- config.Watch(t.Context(), path, current, func(c *config.Config) error {
			w.applied <- c
			return refuse
		}, func(err error) { w.reloaded <- err })
	}()
	t.Cleanup(func() {
		if err := <-done; err != nil {
			t.Errorf("Watch: %v", err)
		}
	})
	return w
}

// next is the next outcome: what was applied, or why not.
func (w watched) next(t *testing.T) (*config.Config, error) {
	t.Helper()
	select {
	case err := <-w.reloaded:
		select {
		case c := <-w.applied:
			return c, err
		default:
			return nil, err
		}
	case <-time.After(30 * time.Second):
		t.Fatal("no reload within 30 s")
		return nil, nil
	}
}

func TestWatchKeepsTheOldConfigWhenTheNewOneIsBad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hearth.yaml")
	write(t, path, valid)
	w := watch(t, path, nil)

	replace(t, path, strings.ReplaceAll(valid, "max: 20", "max: 30"))
	if c, err := w.next(t); err != nil || c == nil || c.NodeGroups()[0].Max != 30 {
		t.Fatalf("a good change: got %v, %v", c, err)
	}
	replace(t, path, strings.ReplaceAll(valid, "max: 20", "max: many"))
	if c, err := w.next(t); c != nil || !config.IsInvalid(err) {
		t.Fatalf("a bad change: got %v, %v", c, err)
	}
	replace(t, path, valid+"http: {address: ':1'}\n")
	if c, err := w.next(t); c != nil || err == nil || !strings.Contains(err.Error(), "http.address: needs a restart") {
		t.Fatalf("a change that needs a restart: got %v, %v", c, err)
	}
	// Back to what is in use: all is well again, and there is nothing to apply.
	replace(t, path, strings.ReplaceAll(valid, "max: 20", "max: 30"))
	if c, err := w.next(t); c != nil || err != nil {
		t.Fatalf("back: got %v, %v", c, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if c, err := w.next(t); c != nil || !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("removed: got %v, %v", c, err)
	}
	replace(t, path, valid)
	if c, err := w.next(t); err != nil || c == nil || c.NodeGroups()[0].Max != 20 {
		t.Fatalf("there again: got %v, %v", c, err)
	}
}

func TestWatchReportsWhatApplyRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hearth.yaml")
	write(t, path, valid)
	refusal := errors.New("not now")
	w := watch(t, path, refusal)
	replace(t, path, strings.ReplaceAll(valid, "max: 20", "max: 30"))
	if c, err := w.next(t); c == nil || !errors.Is(err, refusal) {
		t.Fatalf("got %v, %v", c, err)
	}
}

// TestWatchFollowsConfigMaps changes the file as the kubelet does: the file is
// a link through "..data", a link to a folder, and that link is replaced.
func TestWatchFollowsConfigMaps(t *testing.T) {
	dir := t.TempDir()
	publish := func(revision, text string) {
		if err := os.Mkdir(filepath.Join(dir, revision), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, revision, "hearth.yaml"), text)
		link := filepath.Join(dir, "..data_tmp")
		if err := os.Symlink(revision, link); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(link, filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	publish("..1", valid)
	path := filepath.Join(dir, "hearth.yaml")
	if err := os.Symlink("..data/hearth.yaml", path); err != nil {
		t.Fatal(err)
	}
	w := watch(t, path, nil)
	for i, max := range []int{5, 6} {
		publish(fmt.Sprintf("..%d", i+2), strings.ReplaceAll(valid, "max: 20", fmt.Sprintf("max: %d", max)))
		if c, err := w.next(t); err != nil || c == nil || c.NodeGroups()[0].Max != max {
			t.Fatalf("revision %d: got %v, %v", i+2, c, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(valid))
	f.Add([]byte(valid + "ci: {github: {webhookSecretFile: /x}}\nserver: {tls: {certFile: a}}\n"))
	f.Add([]byte(head + "backend: {aws: {region: r}, kwok: }\nnodeGroups: [{min: -1, max: 1e9}, &a {id: a}, *a]\n"))
	f.Add([]byte("{a: [*b, &b {}]}"))
	f.Add([]byte("--- \n---\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := config.Parse(data, "hearth.yaml")
		if err != nil {
			invalid, ok := errors.AsType[*config.Invalid](err)
			if !ok || len(invalid.Problems) == 0 || c != nil {
				t.Fatalf("got %T %v with %v", err, err, c)
			}
			return
		}
		ids := map[model.GroupID]bool{}
		for _, g := range c.NodeGroups() {
			if g.ID == "" || ids[g.ID] || g.Min < 0 || g.Min > g.Max {
				t.Fatalf("an invalid group came through: %+v", g)
			}
			ids[g.ID] = true
		}
		if (c.Backend.Kwok == nil) == (c.Backend.AWS == nil) {
			t.Fatal("not one backend")
		}
	})
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// replace writes beside the file and renames: nobody sees half a file.
func replace(t *testing.T, path, text string) {
	t.Helper()
	write(t, path+".new", text)
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}
