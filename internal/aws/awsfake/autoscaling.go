package awsfake

import (
	"encoding/xml"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

const noGroup = "AutoScalingGroup name not found - null"

// autoscaling carries out a call of the Auto Scaling API (version 2011-01-01).
func (c *Cloud) autoscaling(call Call) (any, error) {
	form := call.Form
	switch call.Operation {
	case "DescribeAutoScalingGroups":
		return c.describeGroups(call)
	case "DescribeScalingActivities":
		return c.describeActivities(call)
	case "DescribeInstanceRefreshes":
		return c.describeRefreshes(call)
	case "DescribeLaunchConfigurations":
		return c.describeLaunchConfigurations(call)
	case "TerminateInstanceInAutoScalingGroup":
		return c.terminateInGroup(call)
	}
	g := c.groups[call.Group]
	if g == nil {
		return nil, invalid(noGroup)
	}
	switch call.Operation {
	case "SetDesiredCapacity":
		// API_SetDesiredCapacity: the value must be within min and max.
		n, err := strconv.Atoi(form.Get("DesiredCapacity"))
		if err != nil {
			return nil, invalid("DesiredCapacity is not a number")
		}
		if n > g.Max {
			return nil, invalid("New SetDesiredCapacity value %d is above max value %d for the AutoScalingGroup.", n, g.Max)
		}
		if n < g.Min {
			return nil, invalid("New SetDesiredCapacity value %d is below min value %d for the AutoScalingGroup.", n, g.Min)
		}
		if n > g.Desired {
			g.retryAt = time.Time{}
		}
		g.Desired = n
		return empty{XMLName: result("SetDesiredCapacity")}, nil
	case "SetInstanceProtection":
		return c.setProtection(g, call)
	case "EnterStandby":
		return c.enterStandby(g, call)
	case "ExitStandby":
		return c.exitStandby(g, call)
	}
	return nil, &failure{400, "InvalidAction", "Could not find operation " + call.Operation}
}

type empty struct{ XMLName xml.Name }

func result(op string) xml.Name { return xml.Name{Local: op + "Result"} }

type xmlGroup struct {
	Name                 string         `xml:"AutoScalingGroupName"`
	Min                  int            `xml:"MinSize"`
	Max                  int            `xml:"MaxSize"`
	Desired              int            `xml:"DesiredCapacity"`
	Zones                []string       `xml:"AvailabilityZones>member"`
	Created              string         `xml:"CreatedTime"`
	Cooldown             int            `xml:"DefaultCooldown"`
	HealthCheck          string         `xml:"HealthCheckType"`
	LaunchConfiguration  string         `xml:"LaunchConfigurationName,omitempty"`
	LaunchTemplate       *xmlLTSpec     `xml:"LaunchTemplate"`
	Mixed                *xmlMixed      `xml:"MixedInstancesPolicy"`
	NewInstancesProtects bool           `xml:"NewInstancesProtectedFromScaleIn"`
	Instances            []xmlMember    `xml:"Instances>member"`
	Suspended            []xmlSuspended `xml:"SuspendedProcesses>member"`
	Subnets              string         `xml:"VPCZoneIdentifier,omitempty"` // API_AutoScalingGroup: "separated by commas"
	Tags                 []xmlGroupTag  `xml:"Tags>member"`
}

type xmlLTSpec struct {
	ID      string `xml:"LaunchTemplateId"`
	Name    string `xml:"LaunchTemplateName"`
	Version string `xml:"Version"`
}

type xmlMixed struct {
	Distribution *xmlDistribution `xml:"InstancesDistribution"`
	Template     struct {
		Spec      xmlLTSpec     `xml:"LaunchTemplateSpecification"`
		Overrides []xmlOverride `xml:"Overrides>member"`
	} `xml:"LaunchTemplate"`
}

type xmlDistribution struct {
	Base  int `xml:"OnDemandBaseCapacity"`
	Above int `xml:"OnDemandPercentageAboveBaseCapacity"`
}

type xmlOverride struct {
	InstanceType string           `xml:"InstanceType,omitempty"`
	Weight       string           `xml:"WeightedCapacity,omitempty"`
	Requirements *xmlRequirements `xml:"InstanceRequirements"`
}

type xmlRequirements struct {
	MinMiB  int `xml:"MemoryMiB>Min"`
	MinCPUs int `xml:"VCpuCount>Min"`
}

type xmlMember struct {
	ID        string     `xml:"InstanceId"`
	Type      string     `xml:"InstanceType"`
	Zone      string     `xml:"AvailabilityZone"`
	Lifecycle string     `xml:"LifecycleState"`
	Health    string     `xml:"HealthStatus"`
	Template  *xmlLTSpec `xml:"LaunchTemplate"`
	Protected bool       `xml:"ProtectedFromScaleIn"`
}

type xmlSuspended struct {
	Name string `xml:"ProcessName"`
}

type xmlGroupTag struct {
	Key   string `xml:"Key"`
	Value string `xml:"Value"`
}

func (c *Cloud) describeGroups(call Call) (any, error) {
	reads := c.reads()
	names := list(call.Form, "AutoScalingGroupNames.member")
	var keys [][2]string // tag key, value or ""
	for n := 1; call.Form.Has("Filters.member." + strconv.Itoa(n) + ".Name"); n++ {
		at := "Filters.member." + strconv.Itoa(n)
		name := call.Form.Get(at + ".Name")
		for _, v := range list(call.Form, at+".Values.member") {
			if key, ok := strings.CutPrefix(name, "tag:"); ok {
				keys = append(keys, [2]string{key, v})
			} else {
				keys = append(keys, [2]string{v, ""})
			}
		}
	}
	var found []*Group
	for _, name := range slices.Sorted(maps.Keys(reads.groups)) {
		g := reads.groups[name]
		matches := len(names) == 0 || slices.Contains(names, name)
		for _, k := range keys {
			v, ok := g.Tags[k[0]]
			matches = matches && ok && (k[1] == "" || k[1] == v)
		}
		if matches {
			found = append(found, g)
		}
	}
	most, _ := strconv.Atoi(call.Form.Get("MaxRecords"))
	found, next, err := page(found, call.Form.Get("NextToken"), most, min(c.pages, 100))
	if err != nil {
		return nil, err
	}
	answer := struct {
		XMLName xml.Name
		Groups  []xmlGroup `xml:"AutoScalingGroups>member"`
		Next    string     `xml:"NextToken,omitempty"`
	}{XMLName: result("DescribeAutoScalingGroups"), Next: next}
	byGroup := map[string][]*Instance{}
	for _, i := range reads.instances {
		if i.Lifecycle != "" && !i.Hidden {
			byGroup[i.Group] = append(byGroup[i.Group], i)
			if other := c.claimed[i.ID]; other != "" {
				byGroup[other] = append(byGroup[other], i)
			}
		}
	}
	for _, g := range found {
		members := byGroup[g.Name]
		slices.SortFunc(members, func(a, b *Instance) int { return strings.Compare(a.ID, b.ID) })
		answer.Groups = append(answer.Groups, c.describe(g, members))
	}
	return answer, nil
}

func (c *Cloud) describe(g *Group, members []*Instance) xmlGroup {
	x := xmlGroup{
		Name: g.Name, Min: g.Min, Max: g.Max, Desired: g.Desired, Zones: g.Zones,
		Created: stamp(time.Unix(0, 0)), HealthCheck: "EC2", NewInstancesProtects: g.ProtectNew,
		Subnets: strings.Join(g.Subnets, ","),
	}
	spec := xmlLTSpec{ID: g.LaunchTemplate, Version: g.Version}
	if t := c.templates[g.LaunchTemplate]; t != nil {
		spec.Name = t.Name
	}
	switch {
	case len(g.Overrides) > 0 || g.SpotOnly || g.Requirements:
		x.Mixed = &xmlMixed{Distribution: &xmlDistribution{Above: 100}}
		if g.SpotOnly {
			x.Mixed.Distribution.Above = 0
		}
		x.Mixed.Template.Spec = spec
		for _, t := range g.Overrides {
			o := xmlOverride{InstanceType: t}
			if g.Weights {
				o.Weight = "4"
			}
			x.Mixed.Template.Overrides = append(x.Mixed.Template.Overrides, o)
		}
		if g.Requirements {
			x.Mixed.Template.Overrides = []xmlOverride{{Requirements: &xmlRequirements{MinMiB: 16000, MinCPUs: 4}}}
		}
	case g.LaunchTemplate != "":
		x.LaunchTemplate = &spec
	case g.LaunchConfig != "":
		x.LaunchConfiguration = "lc-" + g.Name
	}
	for _, p := range g.Suspended {
		x.Suspended = append(x.Suspended, xmlSuspended{p})
	}
	for _, k := range slices.Sorted(maps.Keys(g.Tags)) {
		x.Tags = append(x.Tags, xmlGroupTag{k, g.Tags[k]})
	}
	for _, i := range members {
		m := xmlMember{ID: i.ID, Type: i.Type, Zone: i.Zone, Lifecycle: i.Lifecycle, Health: "Healthy", Protected: i.Protected}
		if i.Unhealthy {
			m.Health = "Unhealthy"
		}
		if i.Template != "" {
			m.Template = &xmlLTSpec{ID: g.LaunchTemplate, Version: i.Template}
		}
		x.Instances = append(x.Instances, m)
	}
	return x
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

type xmlActivity struct {
	ID          string `xml:"ActivityId"`
	Group       string `xml:"AutoScalingGroupName"`
	Description string `xml:"Description"`
	Cause       string `xml:"Cause"`
	Start       string `xml:"StartTime"`
	End         string `xml:"EndTime,omitempty"`
	Status      string `xml:"StatusCode"`
	Message     string `xml:"StatusMessage,omitempty"`
}

// describeActivities lists the newest first (API_DescribeScalingActivities).
func (c *Cloud) describeActivities(call Call) (any, error) {
	g := c.reads().groups[call.Group]
	if g == nil {
		return nil, invalid(noGroup)
	}
	activities := slices.Clone(g.activities)
	slices.Reverse(activities)
	most, _ := strconv.Atoi(call.Form.Get("MaxRecords"))
	activities, next, err := page(activities, call.Form.Get("NextToken"), most, 100)
	if err != nil {
		return nil, err
	}
	answer := struct {
		XMLName    xml.Name
		Activities []xmlActivity `xml:"Activities>member"`
		Next       string        `xml:"NextToken,omitempty"`
	}{XMLName: result("DescribeScalingActivities"), Next: next}
	for _, a := range activities {
		x := xmlActivity{ID: a.ID, Group: g.Name, Description: a.Description, Cause: "-", Start: stamp(a.Start), Status: a.Status, Message: a.Message}
		if !a.End.IsZero() {
			x.End = stamp(a.End)
		}
		answer.Activities = append(answer.Activities, x)
	}
	return answer, nil
}

// describeRefreshes: API_DescribeInstanceRefreshes.
func (c *Cloud) describeRefreshes(call Call) (any, error) {
	g := c.reads().groups[call.Group]
	if g == nil {
		return nil, invalid(noGroup)
	}
	type item struct {
		ID        string `xml:"InstanceRefreshId"`
		Protected string `xml:"Preferences>ScaleInProtectedInstances"`
		Standby   string `xml:"Preferences>StandbyInstances"`
	}
	answer := struct {
		XMLName xml.Name
		Items   []item `xml:"InstanceRefreshes>member"`
	}{XMLName: result("DescribeInstanceRefreshes")}
	if g.Refreshed != nil {
		answer.Items = []item{{"refresh-1", g.Refreshed[0], g.Refreshed[1]}}
	}
	return answer, nil
}

func (c *Cloud) describeLaunchConfigurations(call Call) (any, error) {
	type xmlLC struct {
		Name string `xml:"LaunchConfigurationName"`
		Type string `xml:"InstanceType"`
	}
	answer := struct {
		XMLName xml.Name
		Configs []xmlLC `xml:"LaunchConfigurations>member"`
	}{XMLName: result("DescribeLaunchConfigurations")}
	for _, name := range list(call.Form, "LaunchConfigurationNames.member") {
		if g := c.groups[strings.TrimPrefix(name, "lc-")]; g != nil {
			answer.Configs = append(answer.Configs, xmlLC{name, g.LaunchConfig})
		}
	}
	return answer, nil
}

// named finds the instances that a call names. All must be in the group and in
// one of the states, else nothing happens.
func (c *Cloud) named(g *Group, ids []string, most int, states ...string) ([]*Instance, error) {
	if len(ids) > most {
		return nil, invalid("The number of instance ids that may be passed in is limited to %d", most)
	}
	var out []*Instance
	for _, id := range ids {
		i := c.instances[id]
		if i == nil || i.Group != g.Name || i.Lifecycle == "" {
			return nil, invalid("The instance %s is not part of Auto Scaling group %s.", id, g.Name)
		}
		if !slices.Contains(states, i.Lifecycle) {
			return nil, invalid("The instance %s is not in %s.", id, strings.Join(states, " or "))
		}
		out = append(out, i)
	}
	return out, nil
}

// setProtection: API_SetInstanceProtection, at most 50 instances.
func (c *Cloud) setProtection(g *Group, call Call) (any, error) {
	members, err := c.named(g, call.Instances, 50, "InService", "EnteringStandby", "Standby")
	if err != nil {
		return nil, err
	}
	for _, i := range members {
		i.Protected = call.Form.Get("ProtectedFromScaleIn") == "true"
	}
	return empty{XMLName: result("SetInstanceProtection")}, nil
}

// enterStandby: as-enter-exit-standby and API_EnterStandby: at most 20
// instances; the desired capacity may not fall below the minimum.
func (c *Cloud) enterStandby(g *Group, call Call) (any, error) {
	members, err := c.named(g, call.Instances, 20, "InService")
	if err != nil {
		return nil, err
	}
	if call.Form.Get("ShouldDecrementDesiredCapacity") == "true" {
		if g.Desired-len(members) < g.Min {
			return nil, invalid("AutoScalingGroup %s has min-size=%d and desired capacity=%d. To place into standby %d instances, please update the AutoScalingGroup sizes appropriately.", g.Name, g.Min, g.Desired, len(members))
		}
		g.Desired -= len(members)
	}
	for _, i := range members {
		i.Lifecycle, i.due = "EnteringStandby", c.now.Add(c.timing.Standby)
	}
	return empty{XMLName: result("EnterStandby")}, nil
}

// exitStandby raises the desired capacity by the number of instances, which
// must not exceed the maximum.
func (c *Cloud) exitStandby(g *Group, call Call) (any, error) {
	members, err := c.named(g, call.Instances, 20, "Standby")
	if err != nil {
		return nil, err
	}
	if g.Desired+len(members) > g.Max {
		return nil, invalid("AutoScalingGroup %s has max-size=%d, and desired capacity=%d. To bring %d instances into service, please update the AutoScalingGroup sizes appropriately.", g.Name, g.Max, g.Desired, len(members))
	}
	g.Desired += len(members)
	for _, i := range members {
		i.Lifecycle, i.due = "Pending", c.now.Add(time.Second)
		i.activity = c.begin(g, "Moving EC2 instance out of Standby: "+i.ID)
	}
	return empty{XMLName: result("ExitStandby")}, nil
}

// terminateInGroup: API_TerminateInstanceInAutoScalingGroup, one instance or,
// with the group's name, up to 100. Protection from scale in does not hinder
// it. The documentation does not say what becomes of the desired capacity when
// an instance is on its way out or in standby already; this one lowers it
// again.
func (c *Cloud) terminateInGroup(call Call) (any, error) {
	ids := call.Instances
	if len(ids) > 100 {
		return nil, invalid("The number of instance ids that may be passed in is limited to 100")
	}
	decrement := call.Form.Get("ShouldDecrementDesiredCapacity") == "true"
	var members []*Instance
	lower := map[*Group]int{}
	for _, id := range ids {
		i := c.instances[id]
		if i == nil || i.Lifecycle == "" || call.Group != "" && i.Group != call.Group {
			return nil, invalid("Instance Id not found - No managed instance found for instance ID: %s", id)
		}
		g := c.groups[i.Group]
		members = append(members, i)
		if decrement {
			lower[g]++
		}
	}
	for g, n := range lower {
		if g.Desired-n < g.Min {
			return nil, invalid("Currently, desiredSize equals minSize (%d). Terminating instance without replacement will violate group's min size constraint. Either set shouldDecrementDesiredCapacity flag to false or lower group's min size.", g.Min)
		}
	}
	for g, n := range lower {
		g.Desired -= n
	}
	for _, i := range members {
		c.end(i, "by request")
	}
	return struct {
		XMLName  xml.Name
		Activity *xmlActivity `xml:"Activity"`
	}{XMLName: result("TerminateInstanceInAutoScalingGroup")}, nil
}
