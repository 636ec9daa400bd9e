package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/hearth-ci/hearth/internal/config"
	"github.com/hearth-ci/hearth/internal/kube"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

func checkCommand() *cobra.Command {
	var path string
	var live bool
	cmd := &cobra.Command{
		Use: "check --config FILE [--live]", Short: "Check a config file, its annotations and the cloud", Args: cobra.NoArgs,
		Long: "Checks the config file and its annotations. With --live it asks the cluster, too: whether\n" +
			"cluster-autoscaler's flags go with Hearth, engines can be known and stopped, and runner pods\n" +
			"may be evicted; and AWS: whether credentials and permissions suffice, which groups are found,\n" +
			"and what of their settings gets in the way. Nothing is changed: permissions are tried by dry\n" +
			"runs and by calls that cannot succeed.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(path)
			if err != nil {
				return usageError{err}
			}
			out := cmd.OutOrStdout()
			for _, text := range checkCertificates(cfg.Server.TLS, time.Now()) {
				fmt.Fprintln(out, "warning:", text)
			}
			for _, w := range cfg.Warnings() {
				fmt.Fprintln(out, "warning:", w)
			}
			problems := cfg.Problems()
			for _, p := range problems {
				fmt.Fprintln(out, "error:", p)
			}
			if len(problems) > 0 {
				err = fmt.Errorf("%d annotations cannot be used; their defaults apply", len(problems))
			}
			if live {
				err = errors.Join(err, checkCluster(cmd.Context(), out, cfg))
				if cfg.Backend.AWS != nil {
					return errors.Join(err, checkAWS(cmd.Context(), out, cfg))
				}
			}
			if err == nil {
				_, err = fmt.Fprintf(out, "%s: ok, %d node groups\n", path, len(cfg.NodeGroups()))
			}
			return err
		},
	}
	cmd.Flags().StringVar(&path, "config", "", "the config file (required)")
	cmd.Flags().BoolVar(&live, "live", false, "ask the cluster and the cloud, too")
	_ = cmd.MarkFlagRequired("config")
	return cmd
}

// checkCluster says what in the cluster gets in Hearth's way. What it finds is
// advice; that there is no cluster to ask is, too, since the file may be for
// another place.
func checkCluster(ctx context.Context, out io.Writer, cfg *config.Config) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	selector, err := labels.Parse(cfg.Engines.PodSelector)
	if err != nil {
		return fmt.Errorf("engines.podSelector: %w", err)
	}
	advice, err := func() ([]string, error) {
		rest, err := clientcmd.BuildConfigFromFlags("", cfg.Kubernetes.Kubeconfig)
		if err != nil {
			return nil, err
		}
		client, err := kube.NewClient(rest)
		if err != nil {
			return nil, err
		}
		watches := cfg.Backend.AWS != nil && cfg.Backend.AWS.DryRun
		return kube.Examine(ctx, client, kube.EngineSelector{Labels: selector, Namespaces: cfg.Engines.Namespaces}, watches)
	}()
	if err != nil {
		advice = []string{fmt.Sprintf("the cluster was not looked at (kubernetes.kubeconfig says which): %v", err)}
	}
	for _, text := range advice {
		fmt.Fprintln(out, "warning:", text)
	}
	return nil
}

// checkAWS says what of the account gets in Hearth's way.
func checkAWS(ctx context.Context, out io.Writer, cfg *config.Config) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	// What the backend logs is about tags that cannot be used.
	cloud, err := newAWS(ctx, cfg, nil, slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelWarn})))
	if err != nil {
		return err
	}
	groups, findings := cloud.Check(ctx)
	bad := 0
	for _, f := range findings {
		kind, about := "warning", ""
		if f.Bad {
			kind = "error"
			bad++
		}
		if f.Group != "" {
			about = fmt.Sprintf(" node group %q:", f.Group)
		}
		fmt.Fprintf(out, "%s:%s %s\n", kind, about, f.Text)
	}
	for _, g := range groups {
		settings, problems := nodegroups.Interpret(g, nil)
		for _, p := range problems {
			bad++
			fmt.Fprintf(out, "error: node group %q: %v\n", g.ID, p)
		}
		fmt.Fprintf(out, "node group %q: %s, %s in zone %s, from %d to %d nodes\n", g.ID, settings.Role, g.Template.InstanceType, g.Template.Zone, g.Min, g.Max)
	}
	if bad > 0 {
		return fmt.Errorf("%d errors", bad)
	}
	_, err = fmt.Fprintf(out, "ok, %d node groups\n", len(groups))
	return err
}
