package main

import (
	"bytes"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/internal/aws/awsfake"
)

// TestCheckLive asks an account, over the wire.
func TestCheckLive(t *testing.T) {
	t.Setenv("AWS_ACCESS_KEY_ID", "test")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "test")
	cloud := awsfake.New(time.Now(), awsfake.Timing{})
	cloud.AddType(awsfake.InstanceType{Name: "m5.large", VCPUs: 2, MiB: 8192, Arch: "x86_64", Interfaces: 3, Address: 10})
	cloud.AddGroup(awsfake.Group{
		Name: "ci", Max: 5, Desired: 1, Capacity: -1, LaunchConfig: "m5.large",
		Tags: map[string]string{"k8s.io/cluster-autoscaler/enabled": "", "hearth.dev/role": "runner", "hearth.dev/min-warm": "1"},
	})
	cloud.Advance(time.Now())
	server := httptest.NewServer(cloud)
	defer server.Close()
	check := func(backend string) (int, string) {
		path := filepath.Join(t.TempDir(), "hearth.yaml")
		text := "apiVersion: hearth.dev/v1alpha1\nkind: ProviderConfig\nserver: {address: \"127.0.0.1:1\"}\nbackend: " + backend + "\n"
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		code := run(t.Context(), []string{"check", "--live", "--config", path}, &out, &out)
		return code, out.String()
	}
	aws := fmt.Sprintf("{aws: {region: us-east-1, endpoint: %q}}", server.URL)
	if code, out := check(aws); code != 0 || !strings.Contains(out, `node group "ci": runner, m5.large in zone us-east-1a, from 0 to 5 nodes`) {
		t.Errorf("code %d: %s", code, out)
	}
	cloud.Edit("ci", func(g *awsfake.Group) { g.Tags["hearth.dev/min-warm"] = "many" })
	cloud.SetFault(func(c awsfake.Call) awsfake.Fault {
		if c.Operation == "EnterStandby" {
			return awsfake.AccessDenied
		}
		return awsfake.None
	})
	code, out := check(aws)
	for _, want := range []string{"autoscaling:EnterStandby is not permitted", "hearth.dev/min-warm", "2 errors"} {
		if code != 1 || !strings.Contains(out, want) {
			t.Errorf("code %d, want 1 and %q: %s", code, want, out)
		}
	}
	if code, out := check("{kwok: {}}"); code != 0 || !strings.Contains(out, "the cluster was not looked at (kubernetes.kubeconfig says which)") {
		t.Errorf("code %d: %s", code, out)
	}
}
