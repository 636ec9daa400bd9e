package kube

import (
	"context"
	"fmt"
	"log/slog"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	recordutil "k8s.io/client-go/tools/record/util"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hearth-ci/hearth/api/v1alpha1"
	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	// eventQueue is how many events may wait to be written; more are dropped.
	eventQueue = 512
	// eventRate bounds all events, objectEventRate those about one object
	// after a burst; both a second.
	eventRate        = 20
	objectEventRate  = 0.1
	objectEventBurst = 25
)

// Events tells people who look at a Node or a RunnerNodeGroup what was done
// about it. Telling never blocks, never fails and is bounded: repeated events
// are counted in one object, and too many are dropped. Its methods may be
// called concurrently.
type Events struct {
	client client.Client
	store  *Store
	logger *slog.Logger
	clock  clock.Clock
	queue  chan *corev1.Event
}

// NewEvents returns Events that are written once Run runs. The store knows the
// UIDs of the groups' objects.
func NewEvents(c client.Client, store *Store, logger *slog.Logger) *Events {
	return &Events{
		client: c, store: store, logger: logger, clock: clock.RealClock{},
		queue: make(chan *corev1.Event, eventQueue),
	}
}

// Node tells something about a Node. The reason is a CamelCase word.
func (e *Events) Node(node model.Node, severity model.Severity, reason, message string) {
	e.tell(corev1.ObjectReference{
		APIVersion: "v1", Kind: "Node", Name: string(node.Name), UID: types.UID(node.UID),
	}, severity, reason, message)
}

// Group tells something about a group's RunnerNodeGroup.
func (e *Events) Group(group model.GroupID, severity model.Severity, reason, message string) {
	e.tell(corev1.ObjectReference{
		APIVersion: v1alpha1.GroupVersion().String(), Kind: "RunnerNodeGroup",
		Name: v1alpha1.GroupName(group), UID: e.store.uid(group),
	}, severity, reason, message)
}

func (e *Events) tell(about corev1.ObjectReference, severity model.Severity, reason, message string) {
	now := metav1.NewTime(e.clock.Now())
	event := &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{
			Name:      recordutil.GenerateEventName(about.Name, now.UnixNano()),
			Namespace: metav1.NamespaceDefault, // of events about cluster-scoped objects
		},
		InvolvedObject: about,
		Source:         corev1.EventSource{Component: "hearth"},
		Type:           string(severity), Reason: clip(reason, 128), Message: clip(message, 1024),
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
		ReportingController: "hearth.dev/hearth",
	}
	select {
	case e.queue <- event:
	default:
		e.logger.Debug("event dropped: too many wait", "object", about.Name, "reason", reason)
	}
}

// Run writes events until ctx ends. It is called once.
func (e *Events) Run(ctx context.Context) {
	limit := rate.NewLimiter(eventRate, eventRate)
	correlator := record.NewEventCorrelatorWithOptions(record.CorrelatorOptions{
		QPS: objectEventRate, BurstSize: objectEventBurst, Clock: e.clock,
	})
	for {
		select {
		case <-ctx.Done():
			return
		case event := <-e.queue:
			if limit.Wait(ctx) != nil {
				return
			}
			if err := e.write(ctx, correlator, event); err != nil && ctx.Err() == nil {
				e.logger.Warn("writing an event", "object", event.InvolvedObject.Name, "reason", event.Reason, "err", err)
			}
		}
	}
}

func (e *Events) write(ctx context.Context, correlator *record.EventCorrelator, event *corev1.Event) error {
	result, err := correlator.EventCorrelate(event)
	if err != nil {
		return fmt.Errorf("correlating an event: %w", err)
	}
	if result.Skip {
		return nil
	}
	event = result.Event
	known := event.Count > 1
	if known {
		err = e.client.Patch(ctx, event, client.RawPatch(types.StrategicMergePatchType, result.Patch))
	}
	if !known || apierrors.IsNotFound(err) { // events expire
		event.ResourceVersion = ""
		err = e.client.Create(ctx, event)
	}
	if err == nil {
		correlator.UpdateState(event)
	}
	return err
}
