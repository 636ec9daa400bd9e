package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/hearth-ci/hearth/pkg/simulate"
)

// parkedShare of a node's price is what a parked one costs by default.
const parkedShare = 0.03

// samples of each policy are drawn in a page.
const samples = 400

// simulateFlags are the values of the simulate command.
type simulateFlags struct {
	traces, policies, formats []string
	out                       string
	strict, sensitivity       bool
	generated                 simulate.Generated
	world                     simulate.World
	options                   simulate.Options
}

func simulateCommand() *cobra.Command {
	f := simulateFlags{world: simulate.DefaultWorld(), generated: simulate.DefaultGenerated()}
	var long strings.Builder
	long.WriteString("Replays CI jobs against policies that keep, park and release nodes, and says what each\n" +
		"costs in money, waiting and cold caches. A trace is CSV (job_id,arrival,duration,key[,group];\n" +
		"epoch seconds, seconds), or saved JSON of GitHub's workflow jobs, GitLab's jobs or Buildkite's\n" +
		"builds; gzipped or not. Several traces are overlaid, weekday by weekday.\n\nPolicies:\n")
	for _, p := range simulate.Policies() {
		fmt.Fprintf(&long, "  %-16s %s\n", p.Name, p.Doc)
	}
	cmd := &cobra.Command{
		Use: "simulate --trace FILE", Short: "Compare policies on a trace of CI jobs", Args: cobra.NoArgs,
		Long: strings.TrimSuffix(long.String(), "\n"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("parked-price") {
				f.world.ParkedPrice = parkedShare * f.world.Price
			}
			return f.run(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr(), cmd.Flags().Changed("generate"))
		},
	}
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		var known []string
		cmd.Flags().VisitAll(func(flag *pflag.Flag) { known = append(known, "--"+flag.Name) })
		return fmt.Errorf("%w; the flags are %s", err, strings.Join(known, ", "))
	})
	f.register(cmd.Flags())
	return cmd
}

func (f *simulateFlags) register(flags *pflag.FlagSet) {
	flags.StringArrayVar(&f.traces, "trace", nil, "file with a trace; may be given several times")
	flags.StringSliceVar(&f.policies, "policy", nil, "policies to compare (default all)")
	flags.StringSliceVar(&f.formats, "format", []string{"table"}, "what to write: "+strings.Join(formatNames(), ", "))
	flags.StringVar(&f.out, "out", "", "directory to write report.* to instead of standard output")
	flags.BoolVar(&f.strict, "strict", false, "fail when a row of a trace cannot be used")
	flags.BoolVar(&f.options.Halves, "halves", false, "also report each half of the trace")
	flags.BoolVar(&f.sensitivity, "sensitivity", false, "also compare the policies in worlds in which one value is half or double")
	flags.BoolVar(&f.options.GroupOnly, "group-only", false, "placement knows a job's group and not its cache key")
	flags.Uint64Var(&f.options.Seed, "seed", 1, "seed of all that is random")

	g := &f.generated
	flags.IntVar(&g.Jobs, "generate", g.Jobs, "make up a trace with this many jobs instead of reading one")
	flags.IntVar(&g.Weeks, "generate-weeks", g.Weeks, "weeks that it lasts")
	flags.IntVar(&g.Keys, "generate-keys", g.Keys, "cache keys in it")
	flags.IntVar(&g.Burst, "generate-burst", g.Burst, "jobs in one run, on average")

	w := &f.world
	flags.DurationVar(&w.Boot, "boot", w.Boot, "time from launching a node until it runs jobs")
	flags.DurationVar(&w.Resume, "resume", w.Resume, "time from resuming a parked node until it runs jobs")
	flags.DurationVar(&w.PodLag, "pod-lag", w.PodLag, "time from a job being queued to its pod, by which hearth hears of it earlier than the others and hearth-no-prescale")
	flags.DurationVar(&w.ReleaseLag, "release-lag", w.ReleaseLag, "time for which a released node still costs its price")
	flags.Float64Var(&w.Price, "price", w.Price, "$/h of a running node")
	flags.Float64Var(&w.ParkedPrice, "parked-price", 0, "$/h of a parked node (default 3 % of --price)")
	flags.IntVar(&w.Slots, "slots", w.Slots, "jobs that a node runs at once")
	flags.Float64Var(&w.ColdFactor, "cold-factor", w.ColdFactor, "a cold job takes 1 + this times as long")
	flags.IntVar(&w.KeysHeld, "keys-held", w.KeysHeld, "cache keys that an engine holds")
	flags.DurationVar(&w.WarmFor, "warm-for", w.WarmFor, "time for which an unused key stays warm")
	flags.Float64Var(&w.DelayPrice, "delay-price", w.DelayPrice, "$/h of a waiting or slowed job")
	flags.IntVar(&w.MaxNodes, "max-nodes", w.MaxNodes, "running nodes at most; 0 is no bound")
}

// reportFormat is one way of writing a report.
type reportFormat struct {
	name, extension string
	write           func(simulate.Report, io.Writer) error
}

func reportFormats() []reportFormat {
	return []reportFormat{
		{"table", "txt", simulate.Report.WriteTable},
		{"csv", "csv", simulate.Report.WriteCSV},
		{"json", "json", simulate.Report.WriteJSON},
		{"html", "html", simulate.Report.WriteHTML},
		{"markdown", "md", simulate.Report.WriteMarkdown},
	}
}

func formatNames() []string {
	var names []string
	for _, f := range reportFormats() {
		names = append(names, f.name)
	}
	return names
}

func (f *simulateFlags) run(ctx context.Context, out, errOut io.Writer, generate bool) error {
	policies, formats, err := f.check(generate)
	if err != nil {
		return usageError{err}
	}
	trace, err := f.trace(generate)
	if err != nil {
		return err
	}
	first := ""
	if len(trace.Rejected) > 0 {
		first = fmt.Sprintf("; the first on line %d: %s", trace.Rejected[0].Line, trace.Rejected[0].Reason)
	}
	switch {
	case len(trace.Rejected) > 0 && f.strict:
		return fmt.Errorf("trace %q: %d rejected%s", trace.Name, len(trace.Rejected), first)
	case len(trace.Jobs) == 0:
		return fmt.Errorf("trace %q: none of %d rows is a usable job%s", trace.Name, trace.Rows, first)
	}
	if slices.ContainsFunc(formats, func(r reportFormat) bool { return r.name == "html" }) {
		f.options.Samples = samples
	}
	report, err := f.report(ctx, errOut, trace, policies)
	if err != nil {
		return err
	}
	return f.write(out, report, formats)
}

// report runs the policies, and shows on errOut how far it is.
func (f *simulateFlags) report(ctx context.Context, errOut io.Writer, t simulate.Trace, policies []simulate.NamedPolicy) (simulate.Report, error) {
	runs := len(policies)
	if f.sensitivity {
		runs += len(policies) * len(simulate.Variations(f.world))
	}
	progress := newProgress(errOut, runs*len(t.Jobs))
	defer progress.clear()
	var results []simulate.Result
	for _, p := range policies {
		o := f.options
		o.Progress = func(arrived int) error {
			progress.show(len(results)*len(t.Jobs)+arrived, p.Name)
			return ctx.Err()
		}
		result, err := simulate.Run(t, f.world, p, o)
		if err != nil {
			return simulate.Report{}, err
		}
		results = append(results, result)
	}
	report := simulate.NewReport(t, f.world, results)
	report.Seed, report.GroupOnly = f.options.Seed, f.options.GroupOnly
	if !f.sensitivity {
		return report, nil
	}
	o := f.options
	o.Progress = func(arrived int) error {
		progress.show(len(policies)*len(t.Jobs)+arrived, "sensitivity")
		return ctx.Err()
	}
	var err error
	report.Sensitivity, err = simulate.Sensitivity(t, f.world, policies, o)
	return report, err
}

// check finds the mistakes in the command line.
func (f *simulateFlags) check(generate bool) ([]simulate.NamedPolicy, []reportFormat, error) {
	if generate == (len(f.traces) > 0) {
		return nil, nil, errors.New("want either --trace FILE or --generate JOBS")
	}
	if err := f.world.Validate(); err != nil {
		return nil, nil, err
	}
	policies := simulate.Policies()
	if len(f.policies) > 0 {
		policies = nil
	}
	for _, name := range f.policies {
		p, err := simulate.FindPolicy(strings.TrimSpace(name))
		if err != nil {
			return nil, nil, err
		}
		policies = append(policies, p)
	}
	ours := 0
	for _, p := range policies {
		if simulate.Ours(p.Name) {
			ours++
		}
	}
	if f.sensitivity && (ours == 0 || ours == len(policies)) {
		return nil, nil, errors.New("--sensitivity compares hearth with others: want both in --policy")
	}
	var formats []reportFormat
	for _, name := range f.formats {
		i := slices.IndexFunc(reportFormats(), func(r reportFormat) bool { return r.name == strings.TrimSpace(name) })
		if i < 0 {
			return nil, nil, fmt.Errorf("unknown format %q, known are %s", name, strings.Join(formatNames(), ", "))
		}
		formats = append(formats, reportFormats()[i])
	}
	return policies, formats, f.generated.Validate()
}

func (f *simulateFlags) trace(generate bool) (simulate.Trace, error) {
	if generate {
		return simulate.Generate(f.generated, rand.New(rand.NewPCG(f.options.Seed, 1)))
	}
	var traces []simulate.Trace
	var names []string
	for _, path := range f.traces {
		t, err := readTrace(path)
		if err != nil {
			return simulate.Trace{}, err
		}
		traces, names = append(traces, t), append(names, path)
	}
	if len(traces) == 1 {
		return traces[0], nil
	}
	return simulate.Mix(strings.Join(names, " + "), traces...), nil
}

func readTrace(path string) (simulate.Trace, error) {
	file, err := os.Open(path)
	if err != nil {
		return simulate.Trace{}, fmt.Errorf("reading trace: %w", err)
	}
	t, err := simulate.Read(path, file)
	return t, errors.Join(err, file.Close())
}

// write puts the report into files, or onto out one format after the other.
func (f *simulateFlags) write(out io.Writer, report simulate.Report, formats []reportFormat) error {
	if f.out == "" {
		for _, format := range formats {
			if err := format.write(report, out); err != nil {
				return fmt.Errorf("writing the report: %w", err)
			}
		}
		return nil
	}
	if err := os.MkdirAll(f.out, 0o750); err != nil {
		return fmt.Errorf("writing the report: %w", err)
	}
	for _, format := range formats {
		path := filepath.Join(f.out, "report."+format.extension)
		file, err := os.Create(path)
		if err != nil {
			return fmt.Errorf("writing the report: %w", err)
		}
		if err := errors.Join(format.write(report, file), file.Close()); err != nil {
			return fmt.Errorf("writing the report %q: %w", path, err)
		}
		if _, err := fmt.Fprintln(out, path); err != nil {
			return err
		}
	}
	return nil
}

// progress tells how far a long simulation is: in place on a terminal, in a
// line now and then elsewhere.
type progress struct {
	out      io.Writer
	terminal bool
	total    int // jobs in all runs
	next     time.Time
	shown    bool
}

func newProgress(out io.Writer, total int) *progress {
	p := &progress{out: out, total: total, next: time.Now().Add(time.Second)}
	if file, ok := out.(*os.File); ok {
		info, err := file.Stat()
		p.terminal = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	return p
}

func (p *progress) show(done int, what string) {
	now := time.Now()
	if now.Before(p.next) {
		return
	}
	percent := 100 * float64(done) / float64(p.total)
	if p.terminal {
		p.next = now.Add(100 * time.Millisecond)
		fmt.Fprintf(p.out, "\r\x1b[Ksimulating %.0f %%: %s", percent, what)
	} else {
		p.next = now.Add(5 * time.Second)
		fmt.Fprintf(p.out, "simulating %.0f %%: %s\n", percent, what)
	}
	p.shown = true
}

// clear takes the line off the terminal.
func (p *progress) clear() {
	if p.terminal && p.shown {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
}
