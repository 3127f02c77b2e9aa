package main

import (
	"os"
	"strconv"
	"strings"
)

const (
	ticksPerSecond = 100 // USER_HZ, which is fixed on Linux
	mebibyte       = 1 << 20
)

// usage is what the server's processes have used of the machine.
type usage struct {
	cpuSeconds float64
	rssMiB     float64
}

// usageOf reads /proc/PID/stat; a process that is gone counts for nothing.
func usageOf(pids []string) usage {
	var total usage
	for _, pid := range pids {
		text, err := os.ReadFile("/proc/" + pid + "/stat")
		if err != nil {
			continue
		}
		// the name of the program is in parentheses and may hold blanks
		fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		total.cpuSeconds += (number(fields[11]) + number(fields[12])) / ticksPerSecond
		total.rssMiB += number(fields[21]) * float64(os.Getpagesize()) / mebibyte
	}
	return total
}

func number(text string) float64 {
	value, err := strconv.ParseFloat(text, 64)
	if err != nil {
		return 0
	}
	return value
}
