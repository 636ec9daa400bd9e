package main

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/hearth-ci/hearth/internal/demo"
	"github.com/hearth-ci/hearth/internal/telemetry"
)

func demoCommand() *cobra.Command {
	var verbose, stay bool
	cmd := &cobra.Command{
		Use: "demo", Short: "Watch the whole loop on this machine", Args: cobra.NoArgs,
		Long: "Runs a real control plane, hearth serve and an autoscaler on loopback, and lets CI jobs\n" +
			"arrive. Ends by itself, or with --stay when you say so. The control plane's binaries come from `make cluster`.\n" +
			"CLUSTER_AUTOSCALER=/path/to/cluster-autoscaler puts a real cluster-autoscaler in front\n" +
			"instead of the reference autoscaler that tests use.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger := slog.New(slog.DiscardHandler)
			if verbose {
				var err error
				if logger, err = telemetry.New(cmd.ErrOrStderr(), "text", "info"); err != nil {
					return err
				}
			}
			telemetry.RouteLibraries(logger)
			self, err := os.Executable()
			if err != nil {
				return fmt.Errorf("finding the hearth binary: %w", err)
			}
			return demo.Run(cmd.Context(), demo.Config{
				Hearth: self, Autoscaler: os.Getenv("CLUSTER_AUTOSCALER"), Out: cmd.OutOrStdout(), Logger: logger, Stay: stay,
			})
		},
	}
	cmd.Flags().BoolVar(&verbose, "verbose", false, "also print what the parts log")
	cmd.Flags().BoolVar(&stay, "stay", false, "keep everything running afterwards, to look around and try things, until Ctrl-C")
	return cmd
}
