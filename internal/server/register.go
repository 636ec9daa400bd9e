package server

import (
	"context"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// register registers a service whose malformed requests (not protobuf, or
// invalid UTF-8 in a text) are the caller's fault, InvalidArgument: gRPC itself
// says Internal.
func register(server *grpc.Server, desc grpc.ServiceDesc, implementation any) {
	desc.Methods = slices.Clone(desc.Methods)
	for i, method := range desc.Methods {
		desc.Methods[i].Handler = func(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
			return method.Handler(srv, ctx, func(into any) error {
				err := decode(into)
				if status.Code(err) == codes.Internal {
					return status.Error(codes.InvalidArgument, status.Convert(err).Message())
				}
				return err
			}, interceptor)
		}
	}
	server.RegisterService(&desc, implementation)
}
