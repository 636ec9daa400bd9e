package main

// mutant is one deliberate defect: where Old is, once, New stands instead. Tests
// are the arguments of the go test that must fail then.
type mutant struct {
	Name, File, Old, New string
	Tests                []string
}

const (
	groups     = "pkg/nodegroups/group.go"
	effects    = "pkg/nodegroups/effect.go"
	engine     = "pkg/nodegroups/engine.go"
	writes     = "internal/controller/writes.go"
	owner      = "internal/controller/owner.go"
	world      = "internal/controller/world.go"
	nodes      = "internal/kube/nodes.go"
	receiver   = "internal/ci/receiver.go"
	admission  = "internal/server/interceptors.go"
	server     = "internal/server/certificates.go"
	scrape     = "internal/dagger/scrape.go"
	awsClients = "internal/aws/clients.go"
)

// mutants lists the defects, the worst first: a node ended that is used or
// wanted, a cache lost, a promise broken, a stranger let in.
func mutants() []mutant {
	// What rapid finds is not to be kept in testdata.
	inGroups, inController := []string{"./pkg/nodegroups", "-rapid.nofailfile"}, []string{"./internal/controller"}
	return []mutant{
		{
			"skip the veto of busy nodes", groups,
			"	case g.occupied(id):\n		return Refuse(", "	case false:\n		return Refuse(", inGroups,
		},
		{
			"end what the plan keeps", groups,
			`		return Refuse(KindVetoed, g.spec.ID, "not-released", "the plan keeps node %q", string(node.Name))`, "		return nil", inGroups,
		},
		{
			"skip the stop of the engine", engine,
			"	if len(m.engines) == 0 {\n		g.conclude(", "	if true {\n		g.conclude(", inGroups,
		},
		{
			"take unknown for idle", engine,
			"	case use.Activity == model.ActivityUnknown && !g.speaks(id):", "	case use.Activity == model.ActivityUnknown:", inGroups,
		},
		{
			"go on to the engine without a live look for pods", engine,
			"!node.Draining || !m.confirmed || used", "!node.Draining || used", inGroups,
		},
		{
			"take a drain back after the engine was told to stop", groups,
			"		return i.Stage == StageDraining && i.leaving() && g.nodes[id].Ready", "		return i.Stage != StageStopping && i.leaving() && g.nodes[id].Ready", inGroups,
		},
		{
			"take one that is missing once for gone", groups,
			"	lostAfter = 2", "	lostAfter = 1", inGroups,
		},
		{
			"exceed the maximum", groups,
			"	if e.Delta > g.spec.Max-g.record.Target {", "	if false {", inGroups,
		},
		{
			"go below the minimum", groups,
			"	if living > 0 && g.record.Target-removed < g.spec.Min {", "	if false {", inGroups,
		},
		{
			"launch twice", groups,
			"		g.record.Target += left\n		g.askedAt = now", "		g.record.Target += 2 * left\n		g.askedAt = now", inGroups,
		},
		{
			"forget hidden nodes in the cloud's number", effects,
			"Desired: seen + revealed + hidden}", "Desired: seen + revealed + 0*hidden}", inGroups,
		},
		{
			"resize beside another call", effects,
			"	if g.snapshot.TakenAt.Before(g.settledAt) {\n		return nil\n	}", "", inGroups,
		},
		{
			"forget that a node was deleted already", groups,
			"		case dead || g.leaving(id):", "		case dead && false || g.leaving(id):", inGroups,
		},
		{
			"answer before it is recorded", writes,
			"		if err := o.record(ctx, next); err != nil {",
			"		o.records.later(id, next.Record(), o.summary(next))\n		if err := error(nil); err != nil {", inController,
		},
		{
			"ignore that recording failed", writes,
			`			return errUnavailable(id, "not-recorded", "the change could not be recorded")`, "", inController,
		},
		{
			"go on after another process has written the record", owner,
			"		o.stop(err)\n", "", inController,
		},
		{
			"drop a lock", world,
			"func (w *World) PodChanged(p model.Pod) {\n	w.mu.Lock()\n	defer w.mu.Unlock()\n", "func (w *World) PodChanged(p model.Pod) {\n",
			[]string{"-race", "./internal/controller"},
		},
		{
			"delete a Node without its UID", nodes,
			"	if uid != \"\" {\n		options", "	if false {\n		options", []string{"./internal/kube"},
		},
		{
			"change another Node of the same name", nodes,
			"	if uid != \"\" && string(o.UID) != uid {", "	if false {", []string{"./internal/kube"},
		},
		{
			"take a person's annotation for ours", nodes,
			"	case has && !ours: // a person's own", "	case has && false:", []string{"./internal/kube"},
		},
		{
			"drop the leader check", admission,
			"		if reader.View() == nil {\n			return nil, errNotSynced\n		}\n", "", []string{"./internal/server"},
		},
		{
			"let anybody in", server,
			"tls.RequireAndVerifyClientCert", "tls.RequestClientCert", []string{"./internal/server", "-run", "TestWhoIsLetIn|TestBadCertificates"},
		},
		{
			"take webhooks that nobody signed", receiver,
			"	if err := s.verify(m); err != nil {\n		return refusal(err)\n	}\n", "", []string{"-short", "./internal/ci"},
		},
		{
			"follow an engine elsewhere", scrape,
			"return http.ErrUseLastResponse }", "return nil }", []string{"./internal/dagger", "-run", "TestRead"},
		},
		{
			"send a call again that may have been done", awsClients,
			"o.RetryMaxAttempts = 1", "o.RetryMaxAttempts = 3", []string{"./internal/aws"},
		},
	}
}
