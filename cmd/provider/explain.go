package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/hearth-ci/hearth/internal/explain"
)

func explainCommand() *cobra.Command {
	var address, format string
	cmd := &cobra.Command{
		Use: "explain [NODE or GROUP]", Short: "Say why each node stays, is parked or goes", Args: cobra.MaximumNArgs(1),
		Long: "Asks the running provider what its last plan came to. Without a name: every group and\n" +
			"every node, the first to go first. With the id of a node group, the name of a node or an\n" +
			"instance id: that one in words, with what would change the decision.\n\n" +
			"In a cluster, run `kubectl -n hearth port-forward deploy/hearth 8087` first; of several\n" +
			"replicas only the leader, whose pod is labelled hearth.dev/leader=true, has a plan.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if format != "table" && format != "json" {
				return usageError{fmt.Errorf("unknown output format %q, known are table, json", format)}
			}
			name := ""
			if len(args) > 0 {
				name = args[0]
			}
			return explained(cmd.Context(), cmd.OutOrStdout(), address, name, format == "json")
		},
	}
	cmd.Flags().StringVar(&address, "address", "http://127.0.0.1:8087", "where the provider serves HTTP (http.address in its config)")
	cmd.Flags().StringVarP(&format, "output", "o", "table", "table or json")
	return cmd
}

// explained writes the whole report, or what it says of that name.
func explained(ctx context.Context, out io.Writer, address, name string, asJSON bool) error {
	report, err := explain.Fetch(ctx, address)
	if errors.Is(err, explain.ErrAddress) {
		return usageError{fmt.Errorf("--address: %w", err)}
	}
	if err != nil {
		return err
	}
	if name == "" {
		if asJSON {
			return writeJSON(out, report)
		}
		return report.WriteTable(out)
	}
	group, node, err := report.Find(name)
	switch {
	case err != nil:
		return err
	case asJSON && node != nil:
		return writeJSON(out, node)
	case asJSON:
		return writeJSON(out, group)
	case node != nil:
		return group.WriteNode(out, node)
	default:
		return group.WriteText(out)
	}
}

func writeJSON(out io.Writer, v any) error {
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
