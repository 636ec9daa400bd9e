package aws

import (
	_ "embed"
	"fmt"
	"strconv"
	"strings"

	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"
)

//go:embed prices.csv
var priceList string

// priceTable are the prices of a list.
type priceTable struct {
	asOf    string // a date
	dollars map[priced]float64
}

type priced struct{ region, instanceType string }

// listedPrices reads the list that is part of the binary: On-Demand, Linux, US
// dollars an hour, as of its date.
func listedPrices() priceTable {
	table := priceTable{dollars: make(map[priced]float64, strings.Count(priceList, "\n"))}
	for line := range strings.Lines(priceList) {
		if head, comment := strings.CutPrefix(line, "#"); comment {
			_, asOf, _ := strings.Cut(head, "As of ")
			table.asOf = strings.TrimSuffix(strings.TrimSpace(asOf), ".")
			continue
		}
		region, rest, _ := strings.Cut(line, ",")
		instanceType, price, _ := strings.Cut(rest, ",")
		if dollars, err := strconv.ParseFloat(strings.TrimSpace(price), 64); err == nil {
			table.dollars[priced{region, instanceType}] = dollars
		}
	}
	return table
}

// homeRegion is the one whose prices stand for those of regions without a list.
// These cost from as much to over half as much again.
const homeRegion = "us-east-1"

// price is what an hour of an instance type costs in a region, in dollars, and
// what is assumed in it, if anything is. False when there is no telling.
func (list priceTable) price(region, instanceType string, info ec2types.InstanceTypeInfo) (dollars float64, assumed string, ok bool) {
	if dollars, ok = list.dollars[priced{region, instanceType}]; ok {
		return dollars, "", true
	}
	if dollars, ok = list.dollars[priced{homeRegion, instanceType}]; ok {
		return dollars, fmt.Sprintf("the list price of %s in %s is not known: $%.4f an hour is assumed from %s", instanceType, region, dollars, homeRegion), true
	}
	if dollars, ok = estimate(info); ok {
		return dollars, fmt.Sprintf("the list price of %s is not known: $%.4f an hour is assumed from its CPUs and memory", instanceType, dollars), true
	}
	return 0, "the list price of " + instanceType + " is not known, and none is estimated", false
}

// estimate is what an hour of an instance type that has no list price costs, in
// dollars, from its CPUs and memory: the two rates are those that come within 3 %
// of m6i, c6i and r6i in us-east-1. False for types with GPUs or other
// accelerators, whose price is mostly that of these.
func estimate(info ec2types.InstanceTypeInfo) (float64, bool) {
	const perCPU, perGiB = 0.035, 0.0033
	if info.GpuInfo != nil && len(info.GpuInfo.Gpus) > 0 || info.InferenceAcceleratorInfo != nil || info.NeuronInfo != nil || info.FpgaInfo != nil || cpusOf(info) == 0 {
		return 0, false
	}
	return perCPU*float64(cpusOf(info)) + perGiB*float64(mibOf(info))/1024, true
}
