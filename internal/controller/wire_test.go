package controller

import (
	"context"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/hearth-ci/hearth/internal/server"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
	"github.com/hearth-ci/hearth/protos/externalgrpc"
)

// wire is cluster-autoscaler's side of a connection to a real server, in memory,
// behind which one life of the controller follows another.
type wire struct {
	group    model.GroupID
	lives    *lives
	listener *bufconn.Listener
	conn     *grpc.ClientConn
	client   externalgrpc.CloudProviderClient
	size     int
	mine     map[model.InstanceID]bool // of this loop, as CA keeps answers
}

// lives passes calls on to the present life.
type lives struct{ now atomic.Pointer[Controller] }

func (l *lives) View() *nodegroups.FleetView {
	if c := l.now.Load(); c != nil {
		return c.View()
	}
	return nil
}

func (l *lives) call(f func(*Controller) error) error {
	if c := l.now.Load(); c != nil {
		return f(c)
	}
	return nodegroups.Refuse(nodegroups.KindUnavailable, "", "", "Hearth is not there")
}

func (l *lives) Refresh(ctx context.Context) error {
	return l.call(func(c *Controller) error { return c.Refresh(ctx) })
}

func (l *lives) IncreaseSize(ctx context.Context, id model.GroupID, delta int) error {
	return l.call(func(c *Controller) error { return c.IncreaseSize(ctx, id, delta) })
}

func (l *lives) DecreaseTargetSize(ctx context.Context, id model.GroupID, delta int) error {
	return l.call(func(c *Controller) error { return c.DecreaseTargetSize(ctx, id, delta) })
}

func (l *lives) DeleteNodes(ctx context.Context, id model.GroupID, ids []model.InstanceID) error {
	return l.call(func(c *Controller) error { return c.DeleteNodes(ctx, id, ids) })
}

func (l *lives) Forget(ctx context.Context) error {
	return l.call(func(c *Controller) error { return c.Forget(ctx) })
}

func (l *lives) ForgetGroup(ctx context.Context, id model.GroupID) error {
	return l.call(func(c *Controller) error { return c.ForgetGroup(ctx, id) })
}

func (*lives) BestOptions([]server.ExpanderOption) []model.GroupID { return nil }

// newWire starts a server and connects to it; both end with the test.
func newWire(t *testing.T, group model.GroupID) *wire {
	w := &wire{group: group, lives: &lives{}, listener: bufconn.Listen(1 << 16)}
	s, err := server.New(server.Config{
		Reader: w.lives, Writer: w.lives, Ranker: w.lives, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Registerer: prometheus.NewRegistry(), Listener: w.listener, ExpanderListener: bufconn.Listen(1),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() { _ = s.Run(ctx) })
	w.connect(t)
	t.Cleanup(func() {
		_ = w.conn.Close()
		cancel()
		serving.Wait()
	})
	return w
}

// connect as cluster-autoscaler does when it starts.
func (w *wire) connect(t *testing.T) {
	if w.conn != nil {
		_ = w.conn.Close()
	}
	var err error
	w.conn, err = grpc.NewClient("passthrough:///hearth", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return w.listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	w.client = externalgrpc.NewCloudProviderClient(w.conn)
}

func wired[Q, A any](call func(context.Context, Q, ...grpc.CallOption) (A, error), q Q) (A, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return call(ctx, q)
}

func (w *wire) begin() error {
	w.mine = map[model.InstanceID]bool{}
	if _, err := wired(w.client.Refresh, &externalgrpc.RefreshRequest{}); err != nil {
		return err
	}
	size, err := wired(w.client.NodeGroupTargetSize, &externalgrpc.NodeGroupTargetSizeRequest{Id: string(w.group)})
	w.size = int(size.GetTargetSize())
	return err
}

func (w *wire) target() int { return w.size }

func (w *wire) owns(id model.InstanceID) bool {
	mine, asked := w.mine[id]
	if !asked {
		answer, err := wired(w.client.NodeGroupForNode, &externalgrpc.NodeGroupForNodeRequest{Node: &externalgrpc.ExternalGrpcNode{ProviderID: string(id)}})
		mine = err == nil && answer.GetNodeGroup().GetId() == string(w.group)
		w.mine[id] = mine
	}
	return mine
}

func (w *wire) increase(n int) error {
	_, err := wired(w.client.NodeGroupIncreaseSize, &externalgrpc.NodeGroupIncreaseSizeRequest{Id: string(w.group), Delta: int32(n)})
	return err
}

func (w *wire) remove(n model.Node) error {
	_, err := wired(w.client.NodeGroupDeleteNodes, &externalgrpc.NodeGroupDeleteNodesRequest{
		Id: string(w.group), Nodes: []*externalgrpc.ExternalGrpcNode{{ProviderID: string(n.ID), Name: string(n.Name)}},
	})
	return err
}
