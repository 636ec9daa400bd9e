package awsfake_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/internal/aws/awsfake"
)

// TestLife follows an instance over the wire: launched, put into standby,
// stopped, started, put back and terminated.
func TestLife(t *testing.T) {
	now := time.Unix(0, 0)
	cloud := awsfake.New(now, awsfake.Timing{Boot: 20 * time.Second, Start: 5 * time.Second, Stop: 5 * time.Second, Terminate: 5 * time.Second, Standby: 2 * time.Second})
	cloud.AddGroup(awsfake.Group{Name: "g", Max: 2, Capacity: -1})
	server := httptest.NewServer(cloud)
	defer server.Close()
	call := func(version, action string, pairs ...string) (int, string) {
		t.Helper()
		form := url.Values{"Action": {action}, "Version": {version}}
		for i := 0; i < len(pairs); i += 2 {
			form.Set(pairs[i], pairs[i+1])
		}
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL, strings.NewReader(form.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		answer, err := server.Client().Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		if err != nil {
			t.Fatal(err)
		}
		return answer.StatusCode, string(body)
	}
	const scaling, ec2 = "2011-01-01", "2016-11-15"
	pass := func(d time.Duration) { now = now.Add(d); cloud.Advance(now) }
	want := func(lifecycle, state string, desired int) {
		t.Helper()
		i := cloud.All()[0]
		g, _ := cloud.Group("g")
		if i.Lifecycle != lifecycle || i.State != state || g.Desired != desired {
			t.Fatalf("got %q %q desired %d, want %q %q desired %d", i.Lifecycle, i.State, g.Desired, lifecycle, state, desired)
		}
	}
	ok := func(version, action string, pairs ...string) {
		t.Helper()
		if status, body := call(version, action, pairs...); status != http.StatusOK {
			t.Fatalf("%s: %d %s", action, status, body)
		}
	}
	if status, body := call(scaling, "SetDesiredCapacity", "AutoScalingGroupName", "g", "DesiredCapacity", "3"); status != http.StatusBadRequest || !strings.Contains(body, "ValidationError") {
		t.Errorf("above max: %d %s", status, body)
	}
	ok(scaling, "SetDesiredCapacity", "AutoScalingGroupName", "g", "DesiredCapacity", "1")
	pass(time.Second)
	want("Pending", "pending", 1)
	pass(20 * time.Second)
	want("InService", "running", 1)
	id := cloud.All()[0].ID
	ok(scaling, "EnterStandby", "AutoScalingGroupName", "g", "InstanceIds.member.1", id, "ShouldDecrementDesiredCapacity", "true")
	want("EnteringStandby", "running", 0)
	pass(2 * time.Second)
	ok(ec2, "StopInstances", "InstanceId.1", id)
	pass(5 * time.Second)
	want("Standby", "stopped", 0)
	ok(ec2, "StartInstances", "InstanceId.1", id)
	pass(5 * time.Second)
	want("Standby", "running", 0)
	ok(scaling, "ExitStandby", "AutoScalingGroupName", "g", "InstanceIds.member.1", id)
	pass(time.Second)
	want("InService", "running", 1)
	ok(scaling, "TerminateInstanceInAutoScalingGroup", "InstanceId", id, "ShouldDecrementDesiredCapacity", "true")
	pass(5 * time.Second)
	want("", "terminated", 0)
}
