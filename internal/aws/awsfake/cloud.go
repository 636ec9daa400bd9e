// Package awsfake is Amazon EC2 Auto Scaling, EC2 and EKS in memory, as far as
// Hearth calls them: a server that speaks the wire of aws-sdk-go-v2 (Query and
// EC2 query with XML, REST with JSON) and has state, timing, eventual
// consistency and failures. It owns everything that a test can see of AWS. It
// never checks signatures, and where AWS's documentation leaves open what a call
// does, it does what hurts most.
//
// Whoever uses it turns its time on with [Cloud.Advance]; nothing runs by
// itself. Behaviour is that of the Auto Scaling user guide and API reference
// (docs.aws.amazon.com/autoscaling/ec2), cited by page name in comments.
package awsfake

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// Timing says how long things take.
type Timing struct {
	Boot      time.Duration // launch to running and InService
	Start     time.Duration // StartInstances to running
	Stop      time.Duration // StopInstances to stopped
	Terminate time.Duration // shutting-down to terminated, and no longer in the group
	Standby   time.Duration // EnteringStandby to Standby
	Retry     time.Duration // between two attempts to launch what could not be
	Health    time.Duration // until a broken instance is noticed
}

// Cloud is the whole of one account and region. Its methods are safe for
// concurrent use.
type Cloud struct {
	mu      sync.Mutex
	now     time.Time
	timing  Timing
	lag     time.Duration
	past    []view
	claimed map[string]string // instances listed by a second group
	seq     int

	groups     map[string]*Group
	instances  map[string]*Instance
	order      []*Instance            // all, as they were launched
	launched   map[string][]*Instance // those in each group
	templates  map[string]*LaunchTemplate
	types      map[string]InstanceType
	nodegroups map[string]Nodegroup
	subnets    map[string]int // free addresses by id

	fault  func(Call) Fault
	counts map[string]int
	calls  []Call
	taken  []string // instances that a group chose to terminate by itself
	pages  int
}

// Group is an Auto Scaling group.
type Group struct {
	Name              string
	Min, Max, Desired int
	Zones             []string
	Tags              map[string]string
	LaunchTemplate    string // id
	Version           string // of the launch template: a number, $Latest or $Default
	Overrides         []string
	Weights           bool   // the overrides have weights
	Requirements      bool   // overrides are instance requirements
	SpotOnly          bool   // mixed instances without On-Demand ones
	LaunchConfig      string // instance type of a launch configuration
	ProtectNew        bool
	Suspended         []string
	Subnets           []string // ids
	// Refreshed are ScaleInProtectedInstances and StandbyInstances of the last
	// instance refresh, nil when there was none.
	Refreshed []string
	// Capacity is the number of instances that can be launched at most;
	// negative is no bound. Refusal is the status message of a launch that
	// could not be made.
	Capacity int
	Refusal  string
	// HookWait keeps new instances in Pending:Wait for so long.
	HookWait time.Duration

	retryAt    time.Time
	failures   int
	activities []Activity
}

// Instance is an EC2 instance.
type Instance struct {
	ID, Group, Zone, Type string
	// Lifecycle is the state in the group, empty when it is not in one; State
	// that of EC2.
	Lifecycle, State string
	Unhealthy        bool
	Protected        bool
	Spot             bool
	InstanceStore    bool // the root device is not on EBS
	StopProtected    bool
	NoCapacity       bool // it cannot be started
	LaunchedAt       time.Time
	Tags             map[string]string
	Template         string // version that it was launched from
	// Listed is false for an instance that descriptions of its group leave out.
	Hidden bool

	due      time.Time // when State or Lifecycle moves on
	activity string
	brokenAt time.Time
}

// Activity is a scaling activity.
type Activity struct {
	ID, Description, Status, Message string
	Start, End                       time.Time
}

// LaunchTemplate is an EC2 launch template; Versions are numbered from 1.
type LaunchTemplate struct {
	ID, Name string
	Default  int
	Versions []TemplateVersion
	Deleted  bool
}

// TemplateVersion is one version of a launch template.
type TemplateVersion struct {
	InstanceType, Image string
	VolumeGiB           int
}

// InstanceType describes an instance type.
type InstanceType struct {
	Name                string
	VCPUs, MiB          int
	GPUs                int
	Storage             bool // has an instance store
	Arch                string
	Interfaces, Address int // network interfaces, IPv4 addresses of each
}

// Nodegroup is an EKS managed node group.
type Nodegroup struct {
	Cluster, Name string
	Labels        map[string]string
	Taints        [][3]string // key, value, EKS's effect such as NO_SCHEDULE
	CapacityType  string
}

// view is what reads saw at a time.
type view struct {
	at        time.Time
	groups    map[string]*Group
	instances map[string]*Instance
}

// New returns an empty cloud at a time.
func New(now time.Time, timing Timing) *Cloud {
	return &Cloud{
		now: now, timing: timing, pages: 100,
		launched: map[string][]*Instance{}, groups: map[string]*Group{}, instances: map[string]*Instance{},
		templates: map[string]*LaunchTemplate{}, types: map[string]InstanceType{},
		claimed: map[string]string{}, nodegroups: map[string]Nodegroup{}, subnets: map[string]int{}, counts: map[string]int{},
	}
}

// SetTiming changes how long things take from now on.
func (c *Cloud) SetTiming(t Timing) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.timing = t
}

// AddGroup adds or replaces a group.
func (c *Cloud) AddGroup(g Group) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if g.Zones == nil {
		g.Zones = []string{"us-east-1a"}
	}
	c.groups[g.Name] = &g
}

// AddTemplate adds a launch template, AddType an instance type, AddNodegroup a
// managed node group.
func (c *Cloud) AddTemplate(t LaunchTemplate) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.templates[t.ID] = &t
}

// AddType adds an instance type.
func (c *Cloud) AddType(t InstanceType) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.types[t.Name] = t
}

// AddNodegroup adds an EKS managed node group.
func (c *Cloud) AddNodegroup(n Nodegroup) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nodegroups[n.Cluster+"/"+n.Name] = n
}

// AddSubnet adds a subnet with so many free addresses. Instances take none: what
// is said of it is what was set.
func (c *Cloud) AddSubnet(id string, free int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.subnets[id] = free
}

// SetLag makes reads show what was true so long ago. SetPage bounds how many
// items a page of an answer has.
func (c *Cloud) SetLag(lag time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lag = lag
	c.remember()
}

// SetPage bounds how many groups or instances a page of an answer has.
func (c *Cloud) SetPage(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pages = n
}

// Edit changes a group behind everybody's back. There must be one.
func (c *Cloud) Edit(name string, change func(*Group)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(c.groups[name])
}

// EditTemplate changes a launch template.
func (c *Cloud) EditTemplate(id string, change func(*LaunchTemplate)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(c.templates[id])
}

// EditInstance changes an instance. There must be one.
func (c *Cloud) EditInstance(id string, change func(*Instance)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(c.instances[id])
}

// Claim has descriptions of a second group list an instance too, as happens
// while it is moved.
func (c *Cloud) Claim(id, group string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.claimed[id] = group
}

// RemoveGroup deletes a group by force, with its instances.
func (c *Cloud) RemoveGroup(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.groups, name)
	for _, i := range c.instances {
		if i.Group == name {
			i.Lifecycle, i.Group = "", ""
			c.shutDown(i)
		}
	}
}

// Group returns a copy of a group; false when there is none.
func (c *Cloud) Group(name string) (Group, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	g, ok := c.groups[name]
	if !ok {
		return Group{}, false
	}
	return *g, true
}

// Groups returns the names of all groups, sorted.
func (c *Cloud) Groups() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Sorted(maps.Keys(c.groups))
}

// Instances returns copies of the instances that are in a group, sorted by id.
func (c *Cloud) Instances(group string) []Instance {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []Instance
	for _, i := range c.members(group) {
		out = append(out, *i)
	}
	return out
}

// All returns copies of all instances that were ever launched, sorted by id.
func (c *Cloud) All() []Instance {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []Instance
	for _, id := range slices.Sorted(maps.Keys(c.instances)) {
		out = append(out, *c.instances[id])
	}
	return out
}

// Taken lists the instances that groups have terminated by themselves to
// reach their desired capacity or balance: the mistakes of whoever set it.
func (c *Cloud) Taken() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.taken)
}

// Terminate ends an instance as somebody does in the EC2 console.
func (c *Cloud) Terminate(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.shutDown(c.instances[id])
}

// Rebalance does what AZRebalance does: it launches an instance and takes an
// unprotected one for it, if there is one (as-instance-termination, "Scale-in
// protection": protected instances are not taken).
func (c *Cloud) Rebalance(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	g := c.groups[name]
	if slices.Contains(g.Suspended, "AZRebalance") {
		return
	}
	if victim := c.victim(name); victim != nil {
		c.launch(g)
		c.take(victim)
	}
}

// Advance turns the cloud's time to now and does everything that is due.
func (c *Cloud) Advance(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = now
	for _, i := range c.order {
		c.move(i)
	}
	for _, name := range slices.Sorted(maps.Keys(c.groups)) {
		c.scale(c.groups[name])
	}
	c.remember()
}

// remember keeps what reads will see once the lag has passed.
func (c *Cloud) remember() {
	if c.lag == 0 {
		c.past = nil
		return
	}
	v := view{at: c.now, groups: map[string]*Group{}, instances: map[string]*Instance{}}
	for name, g := range c.groups {
		v.groups[name] = new(*g)
	}
	for id, i := range c.instances {
		v.instances[id] = new(*i)
	}
	c.past = append(c.past, v)
	for len(c.past) > 1 && c.now.Sub(c.past[1].at) >= c.lag {
		c.past = c.past[1:]
	}
}

// reads returns what reads see now.
func (c *Cloud) reads() view {
	if len(c.past) > 0 {
		return c.past[0]
	}
	return view{at: c.now, groups: c.groups, instances: c.instances}
}

// members lists the instances that are in a group, in the order of their
// launches, which is that of their ids.
func (c *Cloud) members(group string) []*Instance {
	c.launched[group] = slices.DeleteFunc(c.launched[group], func(i *Instance) bool { return i.Lifecycle == "" })
	return c.launched[group]
}

// counts says whether an instance counts towards the desired capacity
// (ec2-auto-scaling-lifecycle: those in standby or leaving do not).
func counted(i *Instance) bool {
	switch i.Lifecycle {
	case "Pending", "Pending:Wait", "Pending:Proceed", "InService":
		return true
	}
	return false
}

func (c *Cloud) active(group string) (n int) {
	for _, i := range c.members(group) {
		if counted(i) {
			n++
		}
	}
	return n
}

// move does what is due of one instance.
func (c *Cloud) move(i *Instance) {
	if !i.due.IsZero() && !c.now.Before(i.due) {
		i.due = time.Time{}
		switch {
		case i.State == "shutting-down":
			i.State = "terminated"
			i.Lifecycle = ""
		case i.State == "stopping":
			i.State = "stopped"
		case i.Lifecycle == "EnteringStandby":
			i.Lifecycle = "Standby"
		case i.Lifecycle == "Standby" && i.State == "pending":
			i.State = "running"
		case i.Lifecycle == "Pending" && c.hook(i) > 0:
			i.State, i.Lifecycle, i.due = "running", "Pending:Wait", c.now.Add(c.hook(i))
		case i.Lifecycle == "Pending", i.Lifecycle == "Pending:Wait":
			i.State, i.Lifecycle = "running", "InService"
			c.finish(i.Group, i.activity, "Successful", "")
			if g := c.groups[i.Group]; g != nil && g.ProtectNew {
				i.Protected = true
			}
		case i.State == "pending":
			i.State = "running"
		}
	}
	// healthcheck: an InService instance that does not run is replaced; one in
	// standby is not checked (as-enter-exit-standby).
	if i.Lifecycle == "InService" && i.State != "running" {
		if i.brokenAt.IsZero() {
			i.brokenAt = c.now
		}
		if c.now.Sub(i.brokenAt) >= c.timing.Health {
			i.Unhealthy = true
			c.end(i, "health-check")
		}
	} else {
		i.brokenAt = time.Time{}
	}
	// What was terminated behind the group's back is dropped at last.
	if i.State == "terminated" && i.Lifecycle != "" {
		i.Lifecycle = ""
	}
}

func (c *Cloud) hook(i *Instance) time.Duration {
	if g := c.groups[i.Group]; g != nil {
		return g.HookWait
	}
	return 0
}

// scale launches what is missing and takes what is too much
// (ec2-auto-scaling-scaling-manually; as-instance-termination).
func (c *Cloud) scale(g *Group) {
	for c.active(g.Name) < g.Desired && !slices.Contains(g.Suspended, "Launch") && !c.now.Before(g.retryAt) {
		living := 0
		for _, i := range c.members(g.Name) {
			if i.State == "pending" || i.State == "running" {
				living++
			}
		}
		if g.Capacity >= 0 && living >= g.Capacity && g.Refusal != "" {
			g.failures++
			id := c.begin(g, "Launching a new EC2 instance.  Status Reason: "+g.Refusal)
			c.finish(g.Name, id, "Failed", g.Refusal+" Launching EC2 instance failed.")
			g.retryAt = c.now.Add(c.timing.Retry)
			break
		}
		c.launch(g)
	}
	for !slices.Contains(g.Suspended, "Terminate") && c.active(g.Name) > g.Desired {
		i := c.victim(g.Name)
		if i == nil {
			break
		}
		c.take(i)
	}
}

// victim is an instance that the group may take: the oldest one, since the
// termination policy is the group owner's choice.
func (c *Cloud) victim(group string) *Instance {
	var victim *Instance
	for _, i := range c.members(group) {
		if counted(i) && !i.Protected && (victim == nil || i.LaunchedAt.Before(victim.LaunchedAt)) {
			victim = i
		}
	}
	return victim
}

func (c *Cloud) take(i *Instance) {
	c.taken = append(c.taken, i.ID)
	c.end(i, "scale-in")
}

// end begins the termination of a member.
func (c *Cloud) end(i *Instance, why string) {
	g := c.groups[i.Group]
	if g != nil {
		c.finish(g.Name, c.begin(g, "Terminating EC2 instance: "+i.ID+" "+why), "Successful", "")
	}
	i.Lifecycle = "Terminating"
	c.shutDown(i)
}

func (c *Cloud) shutDown(i *Instance) {
	if i.State == "terminated" {
		return
	}
	if i.State != "shutting-down" {
		i.State, i.due = "shutting-down", c.now.Add(c.timing.Terminate)
	}
}

func (c *Cloud) launch(g *Group) {
	c.seq++
	typ := g.LaunchConfig
	version := ""
	if t := c.templates[g.LaunchTemplate]; t != nil {
		n := t.number(g.Version)
		if n >= 1 && n <= len(t.Versions) {
			version, typ = fmt.Sprint(n), t.Versions[n-1].InstanceType
		}
	}
	if len(g.Overrides) > 0 {
		typ = g.Overrides[0]
	}
	i := &Instance{
		ID: fmt.Sprintf("i-%017x", c.seq), Group: g.Name, Zone: g.Zones[c.seq%len(g.Zones)], Type: typ,
		Lifecycle: "Pending", State: "pending", LaunchedAt: c.now, Template: version, Spot: g.SpotOnly,
		Tags: map[string]string{groupTag: g.Name}, due: c.now.Add(c.timing.Boot),
	}
	i.activity = c.begin(g, "Launching a new EC2 instance: "+i.ID)
	c.instances[i.ID] = i
	c.order = append(c.order, i)
	c.launched[g.Name] = append(c.launched[g.Name], i)
	g.retryAt = time.Time{}
}

// groupTag is on every instance of a group
// (ec2-auto-scaling-tagging, "tags added by Amazon EC2 Auto Scaling").
const groupTag = "aws:autoscaling:groupName"

func (c *Cloud) begin(g *Group, description string) string {
	c.seq++
	id := fmt.Sprintf("activity-%d", c.seq)
	g.activities = append(g.activities, Activity{ID: id, Description: description, Status: "InProgress", Start: c.now})
	const most = 500
	if len(g.activities) > most {
		g.activities = slices.Clone(g.activities[len(g.activities)-most:])
	}
	return id
}

func (c *Cloud) finish(group, id, status, message string) {
	g := c.groups[group]
	if g == nil {
		return
	}
	// Copied, because reads may still show what was before.
	g.activities = slices.Clone(g.activities)
	for at := range g.activities {
		if a := &g.activities[at]; a.ID == id && a.Status == "InProgress" {
			a.Status, a.Message, a.End = status, message, c.now
		}
	}
}

// number resolves a version.
func (t *LaunchTemplate) number(version string) int {
	switch version {
	case "$Latest":
		return len(t.Versions)
	case "", "$Default":
		return max(t.Default, 1)
	}
	var n int
	if _, err := fmt.Sscan(version, &n); err != nil {
		return 0
	}
	return n
}
