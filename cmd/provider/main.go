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

	"github.com/hearth-ci/hearth/internal/config"
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

// run executes the command line and returns the exit code.
func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	root := &cobra.Command{
		Use:   "hearth",
		Short: "Keeps Dagger engines warm while CI runner nodes scale",
		Long: "Hearth is an external gRPC cloud provider for cluster-autoscaler. It decides which\n" +
			"CI runner nodes stay, which are parked with their cache intact, and which go.",
		SilenceUsage: true, SilenceErrors: true,
		Args: cobra.NoArgs,
	}
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errOut)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(serveCommand(), checkCommand(), demoCommand(), versionCommand())
	for _, c := range root.Commands() {
		args := c.Args
		c.Args = func(cmd *cobra.Command, given []string) error {
			if err := args(cmd, given); err != nil {
				return usageError{err}
			}
			return nil
		}
	}
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(errOut, "hearth:", err)
	var usage usageError
	// cobra's own "unknown command" has no type; only the root can cause it.
	if errors.As(err, &usage) || config.IsInvalid(err) || len(args) > 0 && unknownCommand(root, args[0]) {
		return exitUsage
	}
	return exitFailed
}

func unknownCommand(root *cobra.Command, name string) bool {
	found, _, err := root.Find([]string{name})
	return err != nil || found == root
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
