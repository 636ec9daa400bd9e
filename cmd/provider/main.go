// Command hearth keeps Dagger engines warm while a cluster's CI runner nodes
// scale: it is an external gRPC cloud provider for cluster-autoscaler.
//
// This package holds flags and wiring, nothing else.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	_ "time/tzdata" // schedules name time zones, and a minimal image has none

	"github.com/spf13/cobra"
)

// version is set when the binary is built.
var version = "dev"

// Exit codes of every command.
const (
	exitFailed = 1
	exitUsage  = 2
)

// usageError is a mistake in the command line.
type usageError struct{ error }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "hearth",
		Short: "Keeps Dagger engines warm while CI runner nodes scale",
		Long: "Hearth is an external gRPC cloud provider for cluster-autoscaler. It decides which\n" +
			"CI runner nodes stay, which are parked with their cache intact, and which go.",
		SilenceUsage: true, SilenceErrors: true,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.AddCommand(serveCommand(), checkCommand(), demoCommand(), explainCommand(), simulateCommand(), versionCommand())
	return root
}

// run executes the command line and returns the exit code: 0 ok, 1 failed,
// 2 usage or config error.
func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errOut)
	// A mistake in the command line is whatever fails before a command runs.
	began := false
	for _, c := range root.Commands() {
		runE := c.RunE
		c.RunE = func(cmd *cobra.Command, args []string) error {
			began = true
			return runE(cmd, args)
		}
	}
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(errOut, "hearth:", err)
	var usage usageError
	if !began || errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailed
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "hearth", version)
			return err
		},
	}
}
