package aws

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/autoscaling"
	"github.com/aws/smithy-go/middleware"
	"golang.org/x/time/rate"
)

// TestPace: every request takes its turn, those that the SDK repeats too; one
// that does not get it is not made.
func TestPace(t *testing.T) {
	var made atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		made.Add(1)
		http.Error(w, "no", http.StatusServiceUnavailable)
	}))
	defer server.Close()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	ask := func(limit *rate.Limiter) error {
		made.Store(0)
		clients := FromConfig(awssdk.Config{
			Region: "us-east-1", BaseEndpoint: &server.URL, HTTPClient: client,
			APIOptions: []func(*middleware.Stack) error{paced(limit)},
			Credentials: awssdk.CredentialsProviderFunc(func(context.Context) (awssdk.Credentials, error) {
				return awssdk.Credentials{AccessKeyID: "x", SecretAccessKey: "x"}, nil
			}),
		})
		_, err := clients.AutoScaling.DescribeAutoScalingGroups(t.Context(), &autoscaling.DescribeAutoScalingGroupsInput{})
		return err
	}
	limit := rate.NewLimiter(rate.Inf, 0)
	if err := ask(limit); err == nil || made.Load() != 3 {
		t.Errorf("%d requests, want the three tries of the SDK: %v", made.Load(), err)
	}
	if err := ask(rate.NewLimiter(0, 0)); err == nil || made.Load() != 0 || !strings.Contains(err.Error(), "waiting for a turn") {
		t.Errorf("%d requests without a turn: %v", made.Load(), err)
	}
}
