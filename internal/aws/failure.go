package aws

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/autoscaling"
	astypes "github.com/aws/aws-sdk-go-v2/service/autoscaling/types"
	"github.com/aws/smithy-go"

	"github.com/hearth-ci/hearth/pkg/model"
)

func isCode(err error, codes ...string) bool {
	api, ok := errors.AsType[smithy.APIError](err)
	return ok && slices.Contains(codes, api.ErrorCode())
}

// activities reads the group's newest scaling activities that launch.
func (b *Backend) activities(ctx context.Context, name string) ([]astypes.Activity, error) {
	answer, err := b.cfg.AutoScaling.DescribeScalingActivities(ctx, &autoscaling.DescribeScalingActivitiesInput{
		AutoScalingGroupName: &name, MaxRecords: awssdk.Int32(50),
	})
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(answer.Activities, func(a astypes.Activity) bool {
		return !strings.HasPrefix(awssdk.ToString(a.Description), "Launching")
	}), nil
}

// launching counts launches under way whose instances the group does not list.
func (b *Backend) launching(ctx context.Context, r reading) (n int, err error) {
	activities, err := b.activities(ctx, r.name)
	for _, a := range activities {
		if !finished(a) && !slices.ContainsFunc(r.members, func(m member) bool {
			return strings.Contains(awssdk.ToString(a.Description), m.id)
		}) {
			n++
		}
	}
	return n, err
}

const (
	// failureAge is how old a failure may be that nothing has followed: Auto
	// Scaling tries again by itself, ever more seldom.
	failureAge = time.Hour
	// clockSkew is how far our clock may be ahead of AWS's.
	clockSkew = 5 * time.Second
)

// refusal tells a refused SetDesiredCapacity like a failed launch; nil when it
// may be that the next try succeeds.
func refusal(err error, now time.Time) *model.LaunchFailure {
	f := &model.LaunchFailure{Activity: fmt.Sprintf("refused-%d", now.Unix()), Message: err.Error(), At: now}
	switch {
	case denied(err):
		f.Class = model.FailurePermissions
	case isCode(err, "ValidationError"):
		f.Class = model.FailureUnknown
	default:
		return nil
	}
	return f
}

func finished(a astypes.Activity) bool {
	switch a.StatusCode {
	case astypes.ScalingActivityStatusCodeSuccessful, astypes.ScalingActivityStatusCodeFailed, astypes.ScalingActivityStatusCodeCancelled:
		return true
	}
	return false
}

// lastFailure is the newest attempt of an under-filled group to launch, if it
// failed. What failed before the capacity was last raised is no news of it.
func (b *Backend) lastFailure(ctx context.Context, asg astypes.AutoScalingGroup, raised, now time.Time) (*model.LaunchFailure, error) {
	since := now.Add(-failureAge)
	if raised.Add(-clockSkew).After(since) {
		since = raised.Add(-clockSkew)
	}
	for _, p := range asg.SuspendedProcesses {
		if awssdk.ToString(p.ProcessName) == "Launch" {
			return &model.LaunchFailure{Activity: fmt.Sprintf("suspended-%d", raised.Unix()), Class: model.FailureUnknown, Message: "the group's Launch process is suspended", At: now}, nil
		}
	}
	activities, err := b.activities(ctx, awssdk.ToString(asg.AutoScalingGroupName))
	if err != nil {
		return nil, err
	}
	for _, a := range activities {
		if !finished(a) {
			continue
		}
		if a.StatusCode == astypes.ScalingActivityStatusCodeSuccessful {
			return nil, nil //nolint:nilnil // the last attempt succeeded
		}
		if awssdk.ToTime(a.StartTime).Before(since) {
			return nil, nil //nolint:nilnil // nothing has failed lately
		}
		message, at := awssdk.ToString(a.StatusMessage), awssdk.ToTime(a.StartTime)
		if at.Before(raised) {
			at = raised // by our clock it was after
		}
		return &model.LaunchFailure{Activity: awssdk.ToString(a.ActivityId), Class: classify(message), Message: message, At: at}, nil
	}
	return nil, nil //nolint:nilnil // no attempt has ended
}

// classify reads the message of a failed activity, which has no code. The
// texts are those of the user guide's page "Troubleshoot issues in Amazon EC2
// Auto Scaling" (ts-as-instancelaunchfailure, ts-as-capacity) and the EC2 error
// codes that they may contain; the first that is contained decides.
func classify(message string) model.FailureClass {
	lower := strings.ToLower(message)
	for _, c := range []struct {
		text  string
		class model.FailureClass
	}{
		{"vcpulimitexceeded", model.FailureQuota},
		{"maxspotinstancecountexceeded", model.FailureQuota},
		{"instancelimitexceeded", model.FailureQuota},
		{"vcpu limit", model.FailureQuota},
		{"vcpu capacity than your current", model.FailureQuota},
		{"max spot instance count exceeded", model.FailureQuota},
		{"your quota allows", model.FailureQuota},
		{"volumelimitexceeded", model.FailureQuota},
		{"insufficientfreeaddressesinsubnet", model.FailureNetwork},
		{"free addresses in subnet", model.FailureNetwork},
		{"subnet", model.FailureNetwork},
		{"insufficientinstancecapacity", model.FailureCapacity},
		{"insufficient capacity", model.FailureCapacity},
		{"do not have sufficient", model.FailureCapacity},
		{"no spot capacity available", model.FailureCapacity},
		{"not supported in your requested availability zone", model.FailureCapacity},
		{"request limit exceeded", model.FailureThrottled},
		{"requestlimitexceeded", model.FailureThrottled},
		{"rate exceeded", model.FailureThrottled},
		{"not authorized", model.FailurePermissions},
		{"unauthorizedoperation", model.FailurePermissions},
		{"access denied", model.FailurePermissions},
		{"assume role", model.FailurePermissions},
		{"client error on launch", model.FailurePermissions}, // most often the key of an encrypted volume
		{"launch template", model.FailureTemplate},
		{"image id", model.FailureTemplate},
		{"ami-", model.FailureTemplate},
		{"key pair", model.FailureTemplate},
		{"security group", model.FailureTemplate},
		{"block device mapping", model.FailureTemplate},
	} {
		if strings.Contains(lower, c.text) {
			return c.class
		}
	}
	return model.FailureUnknown
}
