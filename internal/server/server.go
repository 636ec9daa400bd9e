// Package server is the gRPC face that Hearth shows to cluster-autoscaler
// (CA): the CloudProvider and Expander services, health, reflection and TLS. It
// owns the translation between the wire and Hearth's own words, and which code
// stands for which refusal. It never decides what becomes of a node, never
// calls a cloud or the API server, and answers every read from memory.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"time"

	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/hearth-ci/hearth/protos/expander"
	"github.com/hearth-ci/hearth/protos/externalgrpc"
)

const (
	// maxMessage bounds a CloudProvider request, maxExpanderMessage one of the
	// expander: that one carries every pending pod.
	maxMessage         = 16 << 20
	maxExpanderMessage = 128 << 20
	// maxStreams bounds the requests of one connection; CA makes them one
	// after the other.
	maxStreams = 128
	// maxHeaders bounds what comes before a message; CA sends some 200 bytes.
	maxHeaders = 16 << 10
	// maxConnections bounds connections to CloudProvider, also those that have
	// shown no certificate yet: they have ten seconds for it. CA has one.
	maxConnections = 256
	// The expander's client shows no certificate and its messages are large: so
	// few of either. CA makes one request at a time on one connection; of all
	// clients together offersAtOnce are received and ranked at a time, within
	// offerWithin each. CA gives up after five seconds.
	maxExpanderStreams     = 2
	maxExpanderConnections = 16
	offersAtOnce           = 2
	offerWithin            = 10 * time.Second
	// stopWithin is how long requests may take after the server was told to
	// stop.
	stopWithin = 10 * time.Second
)

// Config is what a Server needs. All fields are required but TLS, whose zero
// value means plaintext.
type Config struct {
	Reader     Reader
	Writer     Writer
	Ranker     Ranker
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	TLS        TLS
	// Listener and ExpanderListener are where the two services are served.
	// Run closes them.
	Listener         net.Listener
	ExpanderListener net.Listener
}

func (c Config) validate() error {
	var errs []error
	for _, field := range []struct {
		name    string
		missing bool
	}{
		{"Reader", c.Reader == nil},
		{"Writer", c.Writer == nil},
		{"Ranker", c.Ranker == nil},
		{"Logger", c.Logger == nil},
		{"Registerer", c.Registerer == nil},
		{"Listener", c.Listener == nil},
		{"ExpanderListener", c.ExpanderListener == nil},
	} {
		if field.missing {
			errs = append(errs, fmt.Errorf("%s is required", field.name))
		}
	}
	return errors.Join(append(errs, c.TLS.validate())...)
}

// Server serves CloudProvider with mutual TLS on one listener and Expander
// with server TLS on another: the expander's client has no certificate.
type Server struct {
	config     Config
	cloud      *grpc.Server
	expander   *grpc.Server
	health     *health.Server
	stopWithin time.Duration
}

// New makes a server that reports NOT_SERVING. It starts nothing, but reads
// the certificates, so that a bad one is found at once.
func New(c Config) (*Server, error) {
	if err := c.validate(); err != nil {
		return nil, fmt.Errorf("making the gRPC server: %w", err)
	}
	var mutual, serverOnly []grpc.ServerOption
	if c.TLS != (TLS{}) {
		certs, err := loadCertificates(c.TLS, c.Logger)
		if err != nil {
			return nil, fmt.Errorf("making the gRPC server: %w", err)
		}
		mutual = append(mutual, grpc.Creds(credentials.NewTLS(certs.mutual())))
		serverOnly = append(serverOnly, grpc.Creds(credentials.NewTLS(certs.serverOnly())))
	}
	metrics := grpcprom.NewServerMetrics(grpcprom.WithServerHandlingTimeHistogram(
		grpcprom.WithHistogramBuckets([]float64{.0001, .0003, .001, .003, .01, .03, .1, .3, 1, 3, 10})))
	panics := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "hearth_grpc_panics_total",
		Help: "Requests that ended in a panic and were answered with Internal.",
	})
	for _, collector := range []prometheus.Collector{metrics, panics} {
		if err := c.Registerer.Register(collector); err != nil {
			return nil, fmt.Errorf("making the gRPC server: %w", err)
		}
	}
	around := interceptors(c.Logger, metrics, panics)

	s := &Server{config: c, health: health.NewServer(), stopWithin: stopWithin}
	s.cloud = grpc.NewServer(slices.Concat(mutual, limits(maxMessage, maxStreams), around, []grpc.ServerOption{
		grpc.StatsHandler(tagConnections{}),
		grpc.ChainUnaryInterceptor(admit(c.Reader, c.Writer)),
	})...)
	s.expander = grpc.NewServer(slices.Concat(serverOnly, limits(maxExpanderMessage, maxExpanderStreams), around, []grpc.ServerOption{
		grpc.InTapHandle(inTurn(offersAtOnce, offerWithin)),
	})...)

	register(s.cloud, externalgrpc.CloudProvider_ServiceDesc, &cloudProvider{reader: c.Reader, writer: c.Writer, log: c.Logger})
	register(s.expander, expander.Expander_ServiceDesc, &expanderServer{reader: c.Reader, ranker: c.Ranker})
	for _, server := range []*grpc.Server{s.cloud, s.expander} {
		healthpb.RegisterHealthServer(server, s.health)
		reflection.Register(server)
		metrics.InitializeMetrics(server)
	}
	s.SetServing(false)
	return s, nil
}

// limits bounds what one connection may cost, and has dead peers noticed: CA
// itself dials without keepalive.
func limits(message int, streams uint32) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(newCodec()),
		grpc.MaxRecvMsgSize(message),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(streams),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	}
}

// SetServing sets what the health service says of everything. It may be
// called at any time; after Run ended it has no effect.
func (s *Server) SetServing(serving bool) {
	state := healthpb.HealthCheckResponse_NOT_SERVING
	if serving {
		state = healthpb.HealthCheckResponse_SERVING
	}
	for _, service := range []string{"", externalgrpc.CloudProvider_ServiceDesc.ServiceName, expander.Expander_ServiceDesc.ServiceName} {
		s.health.SetServingStatus(service, state)
	}
}

// Run serves until ctx ends, then takes no new requests, lets those under way
// finish for a few seconds, and returns nil. Call it once.
func (s *Server) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	for listener, server := range map[net.Listener]*grpc.Server{
		netutil.LimitListener(s.config.Listener, maxConnections):                 s.cloud,
		netutil.LimitListener(s.config.ExpanderListener, maxExpanderConnections): s.expander,
	} {
		group.Go(func() error {
			// Stopped before it began is no failure.
			if err := server.Serve(listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
				return fmt.Errorf("serving gRPC on %s: %w", listener.Addr(), err)
			}
			return nil
		})
	}
	group.Go(func() error {
		<-ctx.Done()
		s.health.Shutdown()
		for _, server := range []*grpc.Server{s.cloud, s.expander} {
			group.Go(func() error {
				late := time.AfterFunc(s.stopWithin, server.Stop)
				defer late.Stop()
				server.GracefulStop()
				return nil
			})
		}
		return nil
	})
	return group.Wait()
}
