package server

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync/atomic"
	"time"

	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/hearth-ci/hearth/pkg/nodegroups"
	"github.com/hearth-ci/hearth/protos/expander"
	pb "github.com/hearth-ci/hearth/protos/externalgrpc"
)

// interceptors is what surrounds every request: measured, logged, its error
// made fit for the wire, and innermost kept from ending the process.
func interceptors(log *slog.Logger, metrics *grpcprom.ServerMetrics, panics prometheus.Counter) []grpc.ServerOption {
	recovered := recovery.WithRecoveryHandler(func(p any) error {
		panics.Inc()
		log.Error("request panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		return status.Error(codes.Internal, "internal error; the provider's log says more")
	})
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(
			metrics.UnaryServerInterceptor(),
			logged(log),
			translated(log),
			recovery.UnaryServerInterceptor(recovered),
		),
		grpc.ChainStreamInterceptor(
			metrics.StreamServerInterceptor(),
			recovery.StreamServerInterceptor(recovered),
		),
	}
}

// logged writes a line for every request: writes and failures at info, reads
// at debug. Nothing is put together for a line that is not written.
func logged(log *slog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		began := time.Now()
		resp, err := handler(ctx, req)
		what := write(req)
		level := slog.LevelDebug
		if what != nil || err != nil && status.Code(err) != codes.Unimplemented {
			level = slog.LevelInfo
		}
		if log.Enabled(ctx, level) {
			fields := append([]any{"method", info.FullMethod, "code", status.Code(err).String(), "took", time.Since(began)}, what...)
			if id, ok := req.(interface{ GetId() string }); ok {
				fields = append(fields, "nodegroup", clip(id.GetId()))
			}
			if err != nil {
				fields = append(fields, "err", err)
			}
			log.Log(ctx, level, "request", fields...)
		}
		return resp, err
	}
}

// write describes a request that changes something, nil when it does not.
func write(req any) []any {
	switch r := req.(type) {
	case *pb.NodeGroupIncreaseSizeRequest:
		return []any{"delta", r.GetDelta()}
	case *pb.NodeGroupDecreaseTargetSizeRequest:
		return []any{"delta", r.GetDelta()}
	case *pb.NodeGroupDeleteNodesRequest:
		const most = 10
		var ids []string
		for _, node := range r.GetNodes()[:min(len(r.GetNodes()), most)] {
			ids = append(ids, clip(node.GetProviderID()))
		}
		return []any{"nodes", len(r.GetNodes()), "first", ids}
	case *pb.CleanupRequest:
		return []any{}
	}
	return nil
}

// translated turns the errors of handlers into statuses.
func translated(log *slog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		resp, err := handler(ctx, req)
		if err != nil {
			return nil, toStatus(err, info.FullMethod, log)
		}
		return resp, nil
	}
}

// connection is what is known of one connection.
type connection struct {
	forgetting chan struct{} // holds one token
	known      atomic.Bool   // CA's earlier wishes were forgotten at its first request
}

type connectionKey struct{}

// tagConnections gives every connection its own *connection.
type tagConnections struct{}

func (tagConnections) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context {
	c := &connection{forgetting: make(chan struct{}, 1)}
	c.forgetting <- struct{}{}
	return context.WithValue(ctx, connectionKey{}, c)
}
func (tagConnections) HandleConn(context.Context, stats.ConnStats)                     {}
func (tagConnections) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }
func (tagConnections) HandleRPC(context.Context, stats.RPCStats)                       {}

// admit lets requests to CloudProvider in once there is something to answer
// from, and begins every connection with Forget: CA keeps what it asked for in
// memory only, and a new connection may be a new CA.
func admit(reader Reader, forgetter Forgetter) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		if _, ours := info.Server.(*cloudProvider); !ours {
			return handler(ctx, req)
		}
		if reader.View() == nil {
			return nil, errNotSynced
		}
		if c, ok := ctx.Value(connectionKey{}).(*connection); ok && !c.known.Load() {
			if err := c.forget(ctx, forgetter); err != nil {
				return nil, err
			}
		}
		return handler(ctx, req)
	}
}

// inTurn lets a few of the expander's requests in at a time, over all
// connections, and refuses others before anything of their messages is read:
// whoever reaches the port may send some. One that takes too long, as when its
// message trickles in, is ended.
func inTurn(atOnce int, within time.Duration) tap.ServerInHandle {
	turns := make(chan struct{}, atOnce)
	return func(ctx context.Context, info *tap.Info) (context.Context, error) {
		if info.FullMethodName != expander.Expander_BestOptions_FullMethodName {
			return ctx, nil
		}
		select {
		case turns <- struct{}{}:
		default:
			return nil, status.Errorf(codes.ResourceExhausted, "%d requests are being answered already", atOnce)
		}
		ctx, cancel := context.WithTimeout(ctx, within)
		context.AfterFunc(ctx, func() { cancel(); <-turns }) // it ends with its stream, if not before
		return ctx, nil
	}
}

// errNotSynced is the answer before there is anything to answer from.
var errNotSynced = nodegroups.Refuse(nodegroups.KindUnavailable, "", "not-synced", "not leading, or the first snapshot is not there yet")

// forget has one request of the connection forget; others wait for it.
func (c *connection) forget(ctx context.Context, forgetter Forgetter) error {
	select {
	case <-c.forgetting:
		defer func() { c.forgetting <- struct{}{} }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if c.known.Load() {
		return nil
	}
	if err := forgetter.Forget(ctx); err != nil {
		return nodegroups.Refuse(nodegroups.KindUnavailable, "", "new-connection", "beginning a connection: %v", err)
	}
	c.known.Store(true)
	return nil
}
