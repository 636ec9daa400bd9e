package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/hearth-ci/hearth/internal/config"
)

func checkCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use: "check --config FILE", Short: "Check a config file and its annotations", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(path)
			if err != nil {
				return usageError{err}
			}
			out := cmd.OutOrStdout()
			for _, w := range cfg.Warnings() {
				fmt.Fprintln(out, "warning:", w)
			}
			problems := cfg.Problems()
			for _, p := range problems {
				fmt.Fprintln(out, "error:", p)
			}
			if len(problems) > 0 {
				return fmt.Errorf("%d annotations cannot be used; their defaults apply", len(problems))
			}
			_, err = fmt.Fprintf(out, "%s: ok, %d node groups\n", path, len(cfg.NodeGroups()))
			return err
		},
	}
	cmd.Flags().StringVar(&path, "config", "", "the config file (required)")
	_ = cmd.MarkFlagRequired("config")
	return cmd
}
