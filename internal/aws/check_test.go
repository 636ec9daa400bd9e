package aws_test

import (
	"context"
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/deploy"
	"github.com/hearth-ci/hearth/internal/aws"
	"github.com/hearth-ci/hearth/internal/aws/awsfake"
	"github.com/hearth-ci/hearth/pkg/model"
)

func said(findings []aws.Finding, group model.GroupID, bad bool, text string) bool {
	return slices.ContainsFunc(findings, func(f aws.Finding) bool {
		return f.Group == group && f.Bad == bad && strings.Contains(f.Text, text)
	})
}

func TestCheck(t *testing.T) {
	runner := map[string]string{"hearth.dev/role": "runner", "hearth.dev/park": "stop"}
	with := func(more ...string) map[string]string {
		tags := map[string]string{"hearth.dev/role": "runner", "hearth.dev/park": "stop"}
		for i := 0; i < len(more); i += 2 {
			tags[more[i]] = more[i+1]
		}
		return tags
	}
	in(t, func(c *aws.Config) {
		c.Groups = []model.NodeGroup{{ID: "absent"}}
		c.Prices = map[string]float64{"m9.xlarge": 0.2}
	}, func(a *account) {
		a.AddType(awsfake.InstanceType{Name: "m5d.large", VCPUs: 2, MiB: 8192, Arch: "x86_64", Storage: true, Interfaces: 3, Address: 10})
		a.AddType(awsfake.InstanceType{Name: "m9.large", VCPUs: 2, MiB: 8192, Arch: "x86_64", Interfaces: 3, Address: 10})
		a.AddType(awsfake.InstanceType{Name: "m9.xlarge", VCPUs: 4, MiB: 16384, Arch: "x86_64", Interfaces: 3, Address: 10})
		a.AddType(awsfake.InstanceType{Name: "g9.large", VCPUs: 2, MiB: 8192, GPUs: 1, Arch: "x86_64", Interfaces: 3, Address: 10})
		a.AddNodegroup(awsfake.Nodegroup{Cluster: "prod", Name: "ng"})
		a.add(awsfake.Group{Name: "a fine one", Tags: runner, Desired: 1})
		a.add(awsfake.Group{Name: "bare"})
		a.add(awsfake.Group{Name: "zones", Zones: []string{"a", "b"}})
		a.add(awsfake.Group{Name: "quiet zones", Zones: []string{"a", "b"}, Suspended: []string{"AZRebalance"}})
		a.add(awsfake.Group{Name: "suspended", Suspended: []string{"Launch"}})
		a.add(awsfake.Group{Name: "weights", Overrides: []string{"m5.2xlarge"}, Weights: true})
		a.add(awsfake.Group{Name: "managed", Tags: with("eks:cluster-name", "prod", "eks:nodegroup-name", "ng")})
		a.add(awsfake.Group{Name: "spot", Tags: runner, SpotOnly: true, LaunchTemplate: "lt-1"})
		a.add(awsfake.Group{Name: "store", Tags: runner, LaunchConfig: "m5d.large"})
		a.add(awsfake.Group{Name: "refreshed", Tags: runner, Refreshed: []string{"Wait", "Wait"}})
		a.add(awsfake.Group{Name: "refreshed well", Tags: runner, Refreshed: []string{"Ignore", "Terminate"}})
		a.add(awsfake.Group{Name: "new type", LaunchConfig: "m9.large"})
		a.add(awsfake.Group{Name: "new type, price told", LaunchConfig: "m9.large", Tags: map[string]string{"hearth.dev/node-price": "0.3"}})
		a.add(awsfake.Group{Name: "new type, price configured", LaunchConfig: "m9.xlarge"})
		a.add(awsfake.Group{Name: "new GPU", LaunchConfig: "g9.large"})
		a.AddSubnet("subnet-1", 1)
		a.AddSubnet("subnet-2", 2)
		a.add(awsfake.Group{Name: "crowded", Max: 5, Desired: 1, Subnets: []string{"subnet-1", "subnet-2"}})
		a.add(awsfake.Group{Name: "roomy", Max: 4, Desired: 1, Subnets: []string{"subnet-1", "subnet-2"}})
		a.add(awsfake.Group{Name: "lost subnet", Subnets: []string{"subnet-3"}})
		a.pass(time.Minute)
		before := a.All()
		groups, findings := a.Check(context.Background())
		if len(groups) != 17 {
			t.Errorf("%d groups: %v", len(groups), groups)
		}
		for _, want := range []struct {
			group model.GroupID
			bad   bool
			text  string
		}{
			{"absent", true, "no Auto Scaling group of this name"},
			{"bare", true, "what a node looks like is not known"},
			{"zones", false, "AZRebalance"},
			{"suspended", true, "Launch is suspended"},
			{"weights", true, "weights"},
			{"managed", true, "EKS managed"},
			{"spot", true, "spot"},
			{"store", false, "instance store"},
			{"refreshed", false, "ScaleInProtectedInstances"},
			{"refreshed", false, "StandbyInstances"},
			{"new type", false, "$0.0964 an hour is assumed"},
			{"new GPU", false, "none is estimated"},
			{"crowded", false, "3 free addresses, and it may launch 4 more"},
			{"lost subnet", true, "its subnets cannot be read"},
		} {
			if !said(findings, want.group, want.bad, want.text) {
				t.Errorf("nothing is said of %+v", want)
			}
		}
		if len(findings) != 14 {
			t.Errorf("findings: %+v", findings)
		}
		prices := map[model.GroupID]string{}
		for _, g := range groups {
			prices[g.ID] = g.Annotations["hearth.dev/node-price"]
		}
		if p := prices; !strings.HasPrefix(p["new type"], "0.0964") || p["new type, price told"] != "0.3" || p["new type, price configured"] != "0.2" || p["new GPU"] != "" || p["zones"] != "0.384" || p["spot"] != "" {
			t.Errorf("prices: %v", p)
		}
		a.discover()
		if n := strings.Count(a.log.String(), "m9.large is not known"); n != 1 {
			t.Errorf("the assumed price is logged %d times", n)
		}
		if !reflect.DeepEqual(before, a.All()) {
			t.Error("the check has changed something")
		}
		// Each permission that lacks is named, and nothing else.
		for action, operation := range written(t) {
			a.SetFault(func(c awsfake.Call) awsfake.Fault {
				if c.Operation == operation {
					return awsfake.AccessDenied
				}
				return awsfake.None
			})
			_, findings := a.Check(context.Background())
			if !said(findings, "", true, action+" is not permitted") || len(findings) != 15 {
				t.Errorf("without %s: %+v", action, findings)
			}
		}
		a.SetFault(func(awsfake.Call) awsfake.Fault { return awsfake.AccessDenied })
		if _, findings := a.Check(context.Background()); len(findings) != 1 || !findings[0].Bad {
			t.Errorf("without any permission: %+v", findings)
		}
	})
	in(t, nil, func(a *account) {
		if _, findings := a.Check(context.Background()); !said(findings, "", true, "no Auto Scaling group has the tags") {
			t.Errorf("without groups: %+v", findings)
		}
	})
}

// policy reads the published policy.
func policy(t *testing.T) (statements []struct {
	Sid       string
	Action    any
	Condition map[string]map[string]any
}) {
	t.Helper()
	var p struct{ Statement json.RawMessage }
	if err := json.Unmarshal(deploy.IAMPolicy(), &p); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(p.Statement, &statements); err != nil {
		t.Fatal(err)
	}
	return statements
}

func actions(v any) (out []string) {
	switch v := v.(type) {
	case string:
		return []string{v}
	case []any:
		for _, one := range v {
			out = append(out, one.(string))
		}
	}
	return out
}

// written are the actions that change something, and their operations.
func written(t *testing.T) map[string]string {
	out := map[string]string{}
	for _, s := range policy(t) {
		for _, action := range actions(s.Action) {
			service, operation, _ := strings.Cut(action, ":")
			if s.Condition != nil && service != "kms" {
				out[action] = operation
			}
		}
	}
	return out
}

// TestPolicy: the published policy grants each call that the backend can make,
// and nothing else; what changes something is bound to a tag.
func TestPolicy(t *testing.T) {
	var calls []string
	for service, clients := range map[string]reflect.Type{
		"autoscaling": reflect.TypeFor[aws.AutoScaling](), "ec2": reflect.TypeFor[aws.EC2](), "eks": reflect.TypeFor[aws.EKS](),
	} {
		for m := range clients.Methods() {
			calls = append(calls, service+":"+m.Name)
		}
	}
	// EC2 makes it in our name when an instance with encrypted volumes starts.
	calls = append(calls, "kms:CreateGrant")
	var granted []string
	for _, s := range policy(t) {
		for _, action := range actions(s.Action) {
			granted = append(granted, action)
			_, operation, _ := strings.Cut(action, ":")
			reads := strings.HasPrefix(operation, "Describe") || strings.HasPrefix(operation, "Get")
			if reads != (s.Condition == nil) {
				t.Errorf("%s (%s) has the conditions %v", action, s.Sid, s.Condition)
			}
		}
	}
	slices.Sort(calls)
	slices.Sort(granted)
	if !slices.Equal(calls, granted) {
		t.Errorf("granted are\n%v\nused are\n%v", granted, calls)
	}
}
